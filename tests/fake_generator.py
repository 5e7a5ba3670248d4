"""A Generator without a cluster: its answers are a function of the prompt, and tests can make it fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from cluster.errors import PotluckError
from coordinator.generation import (
    Choice,
    ChoiceEnd,
    GenerationEvent,
    GenerationRequest,
    PromptCached,
    Ready,
    ServedModel,
    TokenEvent,
)
from coordinator.sequence import EndReason
from coordinator.text.model import SamplingDefaults, TextModel
from coordinator.text.template import ChatTemplate
from coordinator.text.tokenizer import Tokenizer
from tests.tiny_tokenizers import END, byte_level

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse me' %}{{ raise_exception('not this one') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
)


def text_model(template: str | None = TEMPLATE, **defaults: float) -> TextModel:
    tokenizer = Tokenizer(byte_level())
    eos = tokenizer.id_of(END)
    assert eos is not None
    compiled = None if template is None else ChatTemplate(template, {})
    return TextModel(tokenizer, compiled, frozenset({eos}), SamplingDefaults(**defaults))  # type: ignore[arg-type]


class FakeGenerator:
    """Says `answer(choice)`, then the end of sequence, over and over; one token of each choice in turn."""

    def __init__(
        self,
        answer: str | Callable[[Choice], Sequence[int]] = "hello world",
        *,
        context_tokens: int | None = 200,
        text: TextModel | None = None,
    ) -> None:
        self.text = text_model() if text is None else text
        self.context_tokens = context_tokens
        self.served: ServedModel | None = ServedModel(
            "demo", frozenset({"org/demo"}), 1_700_000_000, 400, context_tokens, self.text
        )
        self.answer = answer
        self._said = self.encode(answer) if isinstance(answer, str) else ()
        self.cached: dict[int, int] = {}  # tokens of the prompt that were not computed again, by choice
        self.refusal: PotluckError | None = None  # raised instead of the first event
        self.failure: Exception | None = None  # raised after `failure_after` tokens
        self.failure_after = 0
        self.stuck_after: int | None = None  # hangs after so many tokens
        self.requests: list[GenerationRequest] = []
        self.ended: list[tuple[str, int]] = []  # choices whose end the API found
        self.finished: list[str] = []  # requests whose generator has run to its end or been closed
        self.readiness = Ready(True, "")
        self.reason = ""
        self.begun = asyncio.Event()  # the first request has arrived

    def model(self) -> ServedModel | None:
        return self.served

    def finish_choice(self, request_id: str, choice: int) -> None:
        self.ended.append((request_id, choice))

    async def ready(self) -> Ready:
        return self.readiness

    def phase(self) -> str:
        return "serving"

    def status(self) -> Mapping[str, object]:
        return {"nodes": ["a"]}

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        self.requests.append(request)
        self.begun.set()
        try:
            await asyncio.sleep(0)
            if self.refusal is not None:
                raise self.refusal
            async for event in self._events(request):
                yield event
        finally:
            self.finished.append(request.id)

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        assert self.context_tokens is not None
        running = {choice.index: choice for choice in request.choices(self.context_tokens)}
        drawn = dict.fromkeys(running, 0)
        while running:
            for index, choice in list(running.items()):
                await asyncio.sleep(0)
                if self.stuck_after == sum(drawn.values()):
                    await asyncio.Event().wait()
                if self.failure is not None and sum(drawn.values()) == self.failure_after:
                    raise self.failure
                if drawn[index] == 0 and index in self.cached:
                    yield PromptCached(index, self.cached[index])
                token = self._token(request, choice, drawn[index])
                drawn[index] += 1
                yield TokenEvent(index, token)
                ended = token in request.eos_ids and not request.ignore_eos
                if ended or drawn[index] == choice.max_tokens:
                    del running[index]
                    yield ChoiceEnd(index, EndReason.STOP if ended else EndReason.LENGTH)

    def _token(self, request: GenerationRequest, choice: Choice, position: int) -> int:
        tokens = self._said if isinstance(self.answer, str) else self.answer(choice)
        cycle = [*tokens, *request.eos_ids] if position >= request.min_tokens else [*tokens]
        return cycle[position % len(cycle)]

    def encode(self, text: str) -> tuple[int, ...]:
        return self.text.tokenizer.encode(text, add_special_tokens=False)
