"""The Generator that the HTTP API talks to: requests in, tokens out, whatever plan is in force.

Owns the life of every request: its sequences, its events, its cancellation. Knows token ids, not text.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace

from cluster.errors import AtCapacity, ClusterError, DeadlineExceeded, NotReady, PotluckError, RequestError
from cluster.limits import BATCH_TIMEOUT_S
from cluster.steps import Sampling
from cluster.types import SequenceId
from coordinator.deadlines import SERVER_DEADLINES, Deadlines, Limit
from coordinator.events import (
    PrefixCached,
    SequenceDisplaced,
    SequenceEnded,
    SequenceExpired,
    SequenceFailed,
    TokenDrawn,
)
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
from coordinator.lanes import Lane
from coordinator.sequence import SequenceAsk
from coordinator.serving import Serving, first_token
from coordinator.unread import Unread

_PROBE_TIMEOUT_S = 30.0
"""`/ready` gives up on its token after this; the queue may be long, but a minute without one is not ready."""

_PROBE_FRESH_S = 5.0
"""A token that came out this recently proves as much as a new one."""

_BATCH_DEADLINES = Deadlines(
    queue_s=BATCH_TIMEOUT_S,
    first_token_s=BATCH_TIMEOUT_S,
    between_tokens_s=BATCH_TIMEOUT_S,  # it gives its room to others, and waits until they have done
    total_s=BATCH_TIMEOUT_S,
)


@dataclass(frozen=True, slots=True)
class _Open:
    """A request under way: the plan that serves it, and its unfinished choices' sequences there. A sequence's id means
    nothing to another plan."""

    serving: Serving
    live: dict[int, SequenceId]


class InferenceService:
    """Outlives plans: between two of them it says what the coordinator is waiting for."""

    def __init__(
        self,
        status: Callable[[], Mapping[str, object]],
        deadlines: Deadlines = SERVER_DEADLINES,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._status = status
        self._deadlines = {Lane.INTERACTIVE: deadlines, Lane.BATCH: _BATCH_DEADLINES}
        self._now = now
        self._model: ServedModel | None = None
        self._serving: Serving | None = None
        self._phase = "starting"
        self.reason = "the coordinator is starting"
        self._token_at_s: float | None = None
        self._open: dict[str, _Open] = {}

    # -- What the controller tells it --------------------------------------------------------------------

    def set_model(self, model: ServedModel) -> None:
        self._model = model

    def set_phase(self, phase: str, reason: str) -> None:
        """Not serving; `reason` is what clients are told."""
        self._phase, self.reason, self._serving, self._token_at_s = phase, reason, None, None
        self._offer(None)

    def begin(self, serving: Serving) -> None:
        self._serving, self._phase, self.reason = serving, "serving", ""
        self._offer(serving.room.context_tokens)

    def _offer(self, context_tokens: int | None) -> None:
        if self._model is not None:
            self._model = replace(self._model, context_tokens=context_tokens)

    async def prove(self, timeout_s: float) -> float:
        """Let one real token through every stage; returns how long it took. Raises when none comes."""
        serving = self._require()
        began = self._now()
        probe = SequenceAsk(serving.new_sequence(), (0,), Sampling(seed=0, temperature=0.0), max_tokens=1)
        await first_token(serving, probe, timeout_s)
        self._token_at_s = self._now()
        return self._token_at_s - began

    # -- Generator ---------------------------------------------------------------------------------------

    def model(self) -> ServedModel | None:
        return self._model

    def phase(self) -> str:
        return self._phase

    def status(self) -> Mapping[str, object]:
        return self._status()

    async def ready(self) -> Ready:
        if self._serving is None:
            return Ready(False, self.reason)
        if self._token_at_s is not None and self._now() - self._token_at_s < _PROBE_FRESH_S:
            return Ready(True, "")
        try:
            await self.prove(_PROBE_TIMEOUT_S)
        except PotluckError as error:
            return Ready(False, str(error))
        return Ready(True, "")

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Generate every choice; see Generator."""
        serving = self._require()
        choices = {serving.new_sequence(): choice for choice in request.choices(serving.room.context_tokens)}
        if any(choice.max_tokens < 1 for choice in choices.values()):
            raise RequestError("the prompt leaves no room for an answer", code="context_length_exceeded")
        mine = _Open(serving, {choice.index: seq for seq, choice in choices.items()})
        events = Unread(lambda: serving.cancel(list(mine.live.values())))
        deadlines = self._deadlines[request.lane].shortened(request.timeouts_s)
        # How long the first choice waits for room is the request's wait; the others may wait for the first one's.
        patient = replace(deadlines, queue_s=deadlines.total_s)
        asks = [
            _ask(seq, choice, request, patient if place else deadlines)
            for place, (seq, choice) in enumerate(choices.items())
        ]
        serving.submit(asks, events.put)
        self._open[request.id] = mine
        try:
            while mine.live:
                event = await events.get()
                index = choices[event.seq].index
                match event:
                    case PrefixCached(_, tokens):
                        yield PromptCached(index, tokens)
                    case TokenDrawn(_, token):
                        self._token_at_s = self._now()
                        yield TokenEvent(index, token)
                    case SequenceEnded(_, reason):
                        mine.live.pop(index, None)
                        yield ChoiceEnd(index, reason)
                    case SequenceFailed(_, why):
                        raise ClusterError(why)
                    case SequenceExpired():
                        raise _too_late(event)
                    case SequenceDisplaced(_, retry_after_s):
                        raise AtCapacity(
                            "the queue is full, and your requests hold most of it; others came, so try again later",
                            retry_after_s=retry_after_s,
                        )
        finally:
            serving.cancel(list(mine.live.values()))
            del self._open[request.id]

    def finish_choice(self, request_id: str, choice: int) -> None:
        mine = self._open.get(request_id)
        seq = mine.live.pop(choice, None) if mine else None
        if mine is not None and seq is not None:
            mine.serving.finish(seq)

    def _require(self) -> Serving:
        if self._serving is None:
            raise NotReady(self.reason)
        return self._serving


def _ask(seq: SequenceId, choice: Choice, request: GenerationRequest, deadlines: Deadlines) -> SequenceAsk:
    return SequenceAsk(
        seq,
        choice.prompt,
        choice.sampling,
        choice.max_tokens,
        request.min_tokens,
        request.ignore_eos,
        request.eos_ids,
        open_ended=request.max_tokens is None,
        lane=request.lane,
        client=request.client,
        salt=request.salt,
        deadlines=deadlines,
    )


def _too_late(event: SequenceExpired) -> DeadlineExceeded:
    within = f"within {event.seconds:g} s"
    match event.limit:
        case Limit.QUEUE:
            message = f"no room for this request {within}; every place is taken by others"
        case Limit.FIRST_TOKEN:
            message = f"no first token {within} after the request had left the queue"
        case Limit.BETWEEN_TOKENS:
            message = f"no further token {within}"
        case Limit.TOTAL:
            message = f"the answer was not complete {within}"
    field = event.limit.field if event.asked else None
    message += f" (the request's {field})" if field else ""
    return DeadlineExceeded(message, code=f"{event.limit.value}_timeout", field=field)
