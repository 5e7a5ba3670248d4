"""The Generator that the HTTP API talks to: requests in, tokens out, whatever plan is in force.

Owns the life of every request: its sequences, its events, its cancellation. Knows token ids, not text.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace

from cluster.errors import AtCapacity, ClusterError, DeadlineExceeded, NotReady, PotluckError, RequestError
from cluster.limits import BATCH_TIMEOUT_S, GRACE_S
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
from coordinator.parking import Keeper, Parking
from coordinator.sequence import SequenceAsk
from coordinator.serving import Serving, first_token
from coordinator.unread import Unread

_PROBE_TIMEOUT_S = 30.0
"""`/ready` gives up on its token after this; the queue may be long, but a minute without one is not ready."""

_WAITING_TICK_S = 0.1
"""How late the end of a wait may be noticed."""

_PROBE_FRESH_S = 5.0
"""A token that came out this recently proves as much as a new one."""

_BATCH_DEADLINES = Deadlines(
    queue_s=BATCH_TIMEOUT_S,
    first_token_s=BATCH_TIMEOUT_S,
    between_tokens_s=BATCH_TIMEOUT_S,  # it gives its room to others, and waits until they have done
    total_s=BATCH_TIMEOUT_S,
)


@dataclass(slots=True)
class _Open:
    """A request under way: who has it at the moment, and the sequences of its unfinished choices."""

    keeper: Keeper
    live: dict[int, SequenceId]


class InferenceService:
    """Outlives plans: between two of them it says what the coordinator is waiting for."""

    def __init__(
        self,
        status: Callable[[], Mapping[str, object]],
        deadlines: Deadlines = SERVER_DEADLINES,
        now: Callable[[], float] = time.monotonic,
        *,
        grace_s: float = GRACE_S,
    ) -> None:
        self._status = status
        self._grace_s = grace_s
        self._deadlines = {Lane.INTERACTIVE: deadlines, Lane.BATCH: _BATCH_DEADLINES}
        self._now = now
        self._model: ServedModel | None = None
        self._serving: Serving | None = None
        self._parking: Parking | None = None  # while answers wait for a plan
        self._ids = itertools.count(1)  # of sequences; a plan's stages may know one from an earlier plan
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
        self._offer(None if self._parking is None else self._parking.context_tokens)

    def begin(self, serving: Serving) -> None:
        """Serve with this plan from here on, first what waited for it."""
        self._serving, self._phase, self.reason = serving, "serving", ""
        self._offer(serving.context_tokens)
        parking, self._parking = self._parking, None
        if parking is not None:
            self._hand_over(serving)
            serving.adopt(parking.leave())

    def park(self, serving: Serving, reason: str) -> None:
        """This plan is over. Its answers wait for the next one, and so do requests that come meanwhile, until the grace
        is over."""
        stranded = serving.strand(reason)
        asked = {seq for mine in self._open.values() for seq in mine.live.values()}
        if self._parking is None:
            self._parking = Parking(serving.context_tokens, self._grace_s, self._now)
        self._serving = None
        self._hand_over(self._parking)
        self._parking.take([one for one in stranded if one.state.ask.seq in asked])
        for one in stranded:
            if one.state.ask.seq not in asked:  # a probe, which proves nothing any more
                one.listener(SequenceFailed(one.state.ask.seq, reason))

    async def mind_waiting(self) -> None:
        """Tell those who have waited too long for a plan."""
        while True:
            await asyncio.sleep(_WAITING_TICK_S)
            if self._parking is None:
                continue
            self._parking.expire()
            if self._parking.is_over:
                parking, self._parking = self._parking, None
                self._offer(None)
                parking.end(f"no machine came back within {parking.grace_s:g} s ({self.reason})")

    @property
    def waits_for_plan(self) -> bool:
        """Whether answers go on, or requests are taken, as soon as there is one."""
        return self._parking is not None

    def _hand_over(self, keeper: Keeper) -> None:
        for mine in self._open.values():
            mine.keeper = keeper

    def _offer(self, context_tokens: int | None) -> None:
        if self._model is not None:
            self._model = replace(self._model, context_tokens=context_tokens)

    async def prove(self, timeout_s: float) -> float:
        """Let one real token through every stage; returns how long it took. Raises when none comes."""
        serving = self._serving
        if serving is None:
            raise NotReady(self.reason)
        began = self._now()
        probe = SequenceAsk(self._new_sequence(), (0,), Sampling(seed=0, temperature=0.0), max_tokens=1)
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
        keeper = self._keeper()
        choices = {self._new_sequence(): choice for choice in request.choices(keeper.context_tokens)}
        if any(choice.max_tokens < 1 for choice in choices.values()):
            raise RequestError("the prompt leaves no room for an answer", code="context_length_exceeded")
        mine = _Open(keeper, {choice.index: seq for seq, choice in choices.items()})
        events = Unread(lambda: mine.keeper.cancel(list(mine.live.values())))
        deadlines = self._deadlines[request.lane].shortened(request.timeouts_s)
        # How long the first choice waits for room is the request's wait; the others may wait for the first one's.
        patient = replace(deadlines, queue_s=deadlines.total_s)
        asks = [
            _ask(seq, choice, request, patient if place else deadlines)
            for place, (seq, choice) in enumerate(choices.items())
        ]
        keeper.submit(asks, events.put)
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
                    case SequenceFailed(_, why, unserved):
                        raise NotReady(why) if unserved else ClusterError(why)
                    case SequenceExpired():
                        raise _too_late(event)
                    case SequenceDisplaced(_, retry_after_s):
                        raise AtCapacity(
                            "the queue is full, and your requests hold most of it; others came, so try again later",
                            retry_after_s=retry_after_s,
                        )
        finally:
            mine.keeper.cancel(list(mine.live.values()))
            del self._open[request.id]

    def finish_choice(self, request_id: str, choice: int) -> None:
        mine = self._open.get(request_id)
        seq = mine.live.pop(choice, None) if mine else None
        if mine is not None and seq is not None:
            mine.keeper.finish(seq)

    def _keeper(self) -> Keeper:
        keeper = self._serving or self._parking
        if keeper is None:
            raise NotReady(self.reason)
        return keeper

    def _new_sequence(self) -> SequenceId:
        return SequenceId(next(self._ids))


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
