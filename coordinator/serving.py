"""One installed plan in service: the scheduler's decisions into the pipeline, its outcomes back to whoever waits.

The next step is dispatched before anybody is told of the last one, so detokenising never holds up a stage.
Knows sequences, not requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from cluster.errors import NotReady, PotluckError
from cluster.types import SequenceId
from coordinator.admission import Room
from coordinator.events import (
    Event,
    PrefixCached,
    SequenceDisplaced,
    SequenceEnded,
    SequenceExpired,
    SequenceFailed,
    TokenDrawn,
)
from coordinator.narrowing import LinkRate
from coordinator.parking import Listener, Stranded
from coordinator.pipeline import Pipeline, TimedOutcome
from coordinator.prefix_cache import PrefixCache, PrefixStatus
from coordinator.scheduler import Scheduler
from coordinator.sequence import SequenceAsk
from coordinator.telemetry import Telemetry

_DEADLINE_TICK_S = 0.1
"""How late a deadline may be noticed. They are seconds; looking costs microseconds."""


class Serving:
    """Lives as long as its pipeline."""

    def __init__(
        self, pipeline: Pipeline, room: Room, now: Callable[[], float] = time.monotonic, *, prefix_cache: bool = True
    ) -> None:
        self.room = room
        self.telemetry = Telemetry()
        self._scheduler = Scheduler(room, prefixes=PrefixCache(room, enabled=prefix_cache))
        self._pipeline = pipeline
        self._listeners: dict[SequenceId, Listener] = {}
        self._over = ""
        self._now = now

    @property
    def context_tokens(self) -> int:
        return self.room.context_tokens

    async def run(self) -> None:
        """Serve until the pipeline breaks, which raises. Then `strand` or `end` what is left."""
        work = (self._pipeline.run(self._on_outcome), self._watch_deadlines())
        tasks = [asyncio.create_task(item) for item in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._pipeline.close()

    def end(self, reason: str) -> None:
        """Nothing is served any more; every sequence fails for `reason`. Only the first reason counts."""
        if not self._over:
            self._over = reason
            self._deliver(self._scheduler.fail_all(reason))

    def strand(self, reason: str) -> list[Stranded]:
        """Nothing is served any more, for `reason`; every sequence leaves with its listener, in the order in which they
        came."""
        self._over = self._over or reason
        return [Stranded(state, self._listeners.pop(state.ask.seq)) for state in self._scheduler.strand()]

    def adopt(self, stranded: Sequence[Stranded]) -> None:
        """Go on with what another plan left behind."""
        self._listeners |= {one.state.ask.seq: one.listener for one in stranded}
        events = self._scheduler.adopt([one.state for one in stranded], self._now())
        self._pump()
        self._deliver(events)

    def submit(self, asks: Sequence[SequenceAsk], listener: Listener) -> None:
        """Take the choices of one request: all of them, or an error and none."""
        if self._over:
            raise NotReady(self._over)
        events = self._scheduler.submit(asks, self._now())
        for ask in asks:
            self._listeners[ask.seq] = listener
        self._pump()
        self._deliver(events)

    def finish(self, seq: SequenceId) -> None:
        """It has ended well, as its listener found in the text."""
        if self._listeners.pop(seq, None) is not None:
            self._scheduler.finish(seq)
        self._pump()

    def cancel(self, seqs: Sequence[SequenceId]) -> None:
        """Nobody listens any more; their room in the caches is free on every stage."""
        for seq in seqs:
            if self._listeners.pop(seq, None) is not None:
                self._scheduler.cancel(seq)
        self._pump()

    @property
    def load(self) -> tuple[int, int, int]:
        """Sequences waiting, sequences running, cache positions reserved."""
        return self._scheduler.waiting, self._scheduler.running, self._scheduler.reserved_tokens

    @property
    def restarts(self) -> int:
        """How often a sequence had to give its room back and begin again."""
        return self._scheduler.restarts

    @property
    def links(self) -> tuple[LinkRate, ...]:
        """Between the stages, in order."""
        return self._pipeline.narrowing.links

    @property
    def prefixes(self) -> PrefixStatus:
        return self._scheduler.prefixes

    async def _watch_deadlines(self) -> None:
        while True:
            await asyncio.sleep(_DEADLINE_TICK_S)
            expired = self._scheduler.expire(self._now())
            if expired:
                self._pump()
                self._deliver(expired)

    def _pump(self) -> None:
        while not self._over and (step := self._scheduler.next_step(self._now())) is not None:
            self._pipeline.send(step)

    def _on_outcome(self, timed: TimedOutcome) -> None:
        events = self._scheduler.complete(timed.outcome, self._now(), timed.away_s)
        self._pump()
        drawn = sum(isinstance(event, TokenDrawn) for event in events)
        self.telemetry.note(timed, drawn=drawn, decode_only=0 < timed.tokens == timed.rows)
        self._deliver(events)

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            listener = self._listeners.get(event.seq)
            if listener is None:
                continue
            if not isinstance(event, (PrefixCached, TokenDrawn)):
                del self._listeners[event.seq]  # it has ended, well or badly
            listener(event)


async def first_token(serving: Serving, ask: SequenceAsk, timeout_s: float) -> None:
    """Proof that the whole path works: a real token through every stage. Raises when none comes."""
    arrived: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

    def listen(event: Event) -> None:
        if not arrived.done():
            arrived.set_result(event)

    serving.submit([ask], listen)
    try:
        async with asyncio.timeout(timeout_s):
            event = await arrived
    except TimeoutError as error:
        raise PotluckError(f"no token came out within {timeout_s:.0f} s") from error
    finally:
        serving.cancel([ask.seq])
    match event:
        case SequenceFailed():
            raise PotluckError(event.reason)
        case SequenceExpired():
            raise PotluckError(f"no token came out within {event.seconds:.0f} s")
        case SequenceDisplaced():
            raise PotluckError("the queue is full")
        case PrefixCached() | TokenDrawn() | SequenceEnded():
            pass
