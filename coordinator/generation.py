"""The line between the HTTP API and the scheduler: what is asked for, what comes back, who answers.

Pure values and one Protocol. Text lives on the API's side of this line: templates, stop strings, detokenising. Token
ids live on the other: end of sequence, max_tokens, min_tokens, room in the cache.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from cluster.errors import RequestError
from cluster.steps import Sampling
from coordinator.deadlines import Limit
from coordinator.lanes import Lane
from coordinator.sequence import EndReason
from coordinator.text.model import TextModel


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence of a request. Choices are numbered through all prompts: the prompt's index times n plus its own."""

    index: int
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int  # concrete: the context's remainder when the client gave none


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request in token ids. The API has checked every value against the served model."""

    id: str
    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling  # the seed is concrete; `choice` is set by `choices`
    n: int
    max_tokens: int | None  # None: until the context is full
    min_tokens: int  # below this the `eos_ids` may not be drawn
    ignore_eos: bool  # they may be drawn and do not end the choice
    eos_ids: frozenset[int]
    client: str = ""  # whoever asks; clients take turns
    salt: str = ""  # only prompts with the same one share what stages have of them
    lane: Lane = Lane.INTERACTIVE
    timeouts_s: Mapping[Limit, float] = field(default_factory=dict)  # its own wishes, for each choice

    def choices(self, context_tokens: int) -> Iterator[Choice]:
        """The sequences to generate. The noise knows a choice's place among the n of its prompt, not its index: a
        prompt draws the same tokens alone and in a list."""
        for at, prompt in enumerate(self.prompts):
            room = context_tokens - len(prompt)
            limit = room if self.max_tokens is None else self.max_tokens
            for own in range(self.n):
                yield Choice(at * self.n + own, prompt, replace(self.sampling, choice=own), limit)


@dataclass(frozen=True, slots=True)
class PromptCached:
    """The first tokens of this choice's prompt were not computed again: stages had them. Comes before its first token,
    and only where there are any."""

    choice: int
    tokens: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token, as soon as it is drawn; the end of sequence included."""

    choice: int
    token: int


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """Nothing of this choice follows."""

    choice: int
    reason: EndReason


GenerationEvent = PromptCached | TokenEvent | ChoiceEnd


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What clients may know about the model, and what the API needs to turn text into tokens and back."""

    name: str
    aliases: frozenset[str]  # other names that clients may use for it
    created_s: int  # Unix time
    vocab_size: int  # rows of the embedding: prompt ids are below it
    context_tokens: int | None  # None until a plan is installed
    text: TextModel

    def check_name(self, name: str | None) -> None:
        """A client that names no model means this one."""
        if name is not None and name != self.name and name not in self.aliases:
            raise RequestError(
                f"the model {name[:200]!a} is not served here; {self.name!a} is", field="model", code="model_not_found"
            )


@dataclass(frozen=True, slots=True)
class Ready:
    ok: bool
    reason: str  # what is missing; empty when ok


class Generator(Protocol):
    """Whoever turns prompts into tokens: the coordinator's service, or a stand-in in tests."""

    def model(self) -> ServedModel | None:
        """None while the model's files are not here yet."""
        ...

    def submit(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Generate every choice. Raises AtCapacity, NotReady or RequestError instead of the first event, and
        ClusterError whenever the cluster cannot go on. Closing the generator cancels what is left."""
        ...

    def finish_choice(self, request_id: str, choice: int) -> None:
        """This choice has come to its end in the text (a stop string): an answer like any other. Events that cross
        with this are ignored, and its ChoiceEnd need not come. Unknown choices are no error."""
        ...

    async def ready(self) -> Ready:
        """Whether a real token comes out of the pipeline."""
        ...

    def phase(self) -> str:
        """What the coordinator is doing, in a word or two: waiting for nodes, loading, serving."""
        ...

    @property
    def reason(self) -> str:
        """Why it does not serve, and how far it is; empty while it does."""
        ...

    def status(self) -> Mapping[str, object]:
        """Everything that a status page shows, ready for JSON."""
        ...
