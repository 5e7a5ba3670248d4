"""An answer as it grows: tokens become text, stop strings end choices. Knows neither HTTP nor the two APIs' shapes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from cluster.errors import ClusterError
from coordinator.api.schema import Options
from coordinator.generation import ChoiceEnd, GenerationRequest, Generator, PromptCached, ServedModel, TokenEvent
from coordinator.sequence import EndReason
from coordinator.text.detokenizer import Detokenizer
from coordinator.text.histories import Conversation
from coordinator.text.model import TextModel
from coordinator.text.stops import StopMatcher


@dataclass(frozen=True, slots=True)
class Job:
    """A request that has been understood."""

    id: str
    created_s: int  # Unix time
    model: ServedModel
    options: Options
    request: GenerationRequest
    continues: bool  # the answer goes on after the prompt's text (completions) instead of beginning one (chats)
    conversation: Conversation | None = None  # of a chat, which may go on after this answer

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.request.prompts)

    @property
    def choice_count(self) -> int:
        return len(self.request.prompts) * self.request.n

    def prompt_of(self, choice: int) -> tuple[int, ...]:
        return self.request.prompts[choice // self.request.n]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token adds, or how a choice ended. Every token makes one, even when it shows no text yet."""

    choice: int
    text: str
    tokens: tuple[int, ...]
    end: EndReason | None = None
    cached_tokens: int = 0  # of the choice's prompt; told with its first token


class ChoiceText:
    """One choice: its tokens, and the text that may be shown of them."""

    def __init__(self, text: TextModel, request: GenerationRequest, stops: Sequence[str], *, continues: bool) -> None:
        self._detokenizer = Detokenizer(text.tokenizer, continues=continues)
        self._stops = StopMatcher(stops)
        self._unseen = frozenset() if request.ignore_eos else request.eos_ids
        self._min_tokens = request.min_tokens
        self._count = 0

    def push(self, token: int) -> tuple[str, bool]:
        """The text that appears with this token, and whether a stop string is complete. As in vLLM, stop strings
        count from min_tokens on. The end of sequence is never shown, even where the tokenizer calls it plain text."""
        self._count += 1
        text = "" if token in self._unseen else self._detokenizer.push(token)
        if self._count <= self._min_tokens:
            return text, False
        return self._stops.push(text)

    def finish(self) -> str:
        """The text that was held back, now that nothing follows."""
        text, stopped = self._stops.push(self._detokenizer.finish())
        return text if stopped else text + self._stops.flush()


async def generate(generator: Generator, job: Job) -> AsyncGenerator[Delta, None]:
    """Everything that happens to the job's choices, until all have ended. Closing this cancels the rest."""
    request = job.request
    choices = {
        index: ChoiceText(job.model.text, request, job.options.stops, continues=job.continues)
        for index in range(job.choice_count)
    }
    cached: dict[int, int] = {}
    first: list[int] = []  # the first choice's: clients that ask for several mostly go on from that one
    async with aclosing(generator.submit(request)) as events:
        async for event in events:
            if event.choice not in choices:
                continue  # it crossed with the cancelling of a choice
            match event:
                case PromptCached(choice, tokens):
                    cached[choice] = tokens
                case TokenEvent(choice, token):
                    if choice == 0:
                        first.append(token)
                    text, stopped = choices[choice].push(token)
                    if stopped:
                        del choices[choice]
                        generator.finish_choice(request.id, choice)
                    yield Delta(choice, text, (token,), cached_tokens=cached.pop(choice, 0))
                    if stopped:
                        yield Delta(choice, "", (), EndReason.STOP)
                case ChoiceEnd(choice, reason):
                    if choice == 0 and job.conversation is not None:
                        job.conversation.answered(first, request.eos_ids)
                    yield Delta(choice, choices.pop(choice).finish(), (), reason)
            if not choices:
                return
    raise ClusterError("the pipeline ended before the answer did")
