"""Answers whose plan is gone, until the next one goes on with them or nobody may wait any longer; and requests that
come meanwhile.

Pure but for the listeners that it calls: its only clock is the times that it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cluster.errors import AtCapacity
from cluster.types import SequenceId
from coordinator.admission import check_lengths
from coordinator.crowding import QueueLimits
from coordinator.deadlines import Limit, Times
from coordinator.events import Event, SequenceExpired, SequenceFailed
from coordinator.queue import RETRY_UNKNOWN_S
from coordinator.sequence import SequenceAsk, SequenceState

Listener = Callable[[Event], None]

BREAKS_MAX: Final = 3
"""Plans in a row that may break before a sequence has another token. More look like its own doing."""


class Keeper(Protocol):
    """Whoever has sequences at the moment: a plan in service, or the parking between two."""

    @property
    def context_tokens(self) -> int: ...

    def submit(self, asks: Sequence[SequenceAsk], listener: Listener) -> None:
        """Take the choices of one request: all of them, or an error and none."""
        ...

    def finish(self, seq: SequenceId) -> None:
        """It has ended well, as its listener found in the text."""
        ...

    def cancel(self, seqs: Sequence[SequenceId]) -> None:
        """Nobody listens any more."""
        ...


@dataclass(frozen=True, slots=True)
class Stranded:
    """A sequence without a plan, and who waits for it."""

    state: SequenceState
    listener: Listener


class Parking:
    """Of one interruption, for at most `grace_s`. `context_tokens` are the last plan's, by which requests are measured
    that come meanwhile."""

    def __init__(
        self, context_tokens: int, grace_s: float, now: Callable[[], float], limits: QueueLimits | None = None
    ) -> None:
        self.context_tokens = context_tokens
        self.grace_s = grace_s
        self._until_s = now() + grace_s
        self._now = now
        self._limits = limits or QueueLimits()
        self._waiting: dict[SequenceId, Stranded] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_over(self) -> bool:
        return self._now() >= self._until_s

    def take(self, stranded: Sequence[Stranded]) -> None:
        """Those of a plan that broke. Whatever breaks one plan after the other is not tried for ever."""
        for one in stranded:
            if one.state.breaks < BREAKS_MAX:
                self._waiting[one.state.ask.seq] = one
            else:
                why = f"{BREAKS_MAX} plans in a row broke while this answer was computed; it is not tried again"
                one.listener(SequenceFailed(one.state.ask.seq, why))

    def leave(self) -> list[Stranded]:
        """Everything goes on elsewhere, in its order."""
        leaving = list(self._waiting.values())
        self._waiting.clear()
        return leaving

    def end(self, reason: str) -> None:
        """Nobody waits any longer."""
        for one in self.leave():
            one.listener(SequenceFailed(one.state.ask.seq, reason, unserved=True))

    def expire(self) -> None:
        """Whoever took too long ends here. What a stage may take does not count while there is none, unless the request
        named it."""
        now = self._now()
        for one in list(self._waiting.values()):
            ask = one.state.ask
            limit = ask.deadlines.passed(one.state.times, now)
            if limit in (Limit.QUEUE, Limit.TOTAL) or limit in ask.deadlines.asked:
                assert limit is not None
                del self._waiting[ask.seq]
                asked = limit in ask.deadlines.asked
                one.listener(SequenceExpired(ask.seq, limit, ask.deadlines.seconds(limit), asked))

    # -- Keeper ------------------------------------------------------------------------------------------

    def submit(self, asks: Sequence[SequenceAsk], listener: Listener) -> None:
        check_lengths(asks, self.context_tokens)
        if not self._limits.hold([*(one.state.ask for one in self._waiting.values()), *asks]):
            raise AtCapacity(
                f"{len(self._waiting)} requests wait for a machine to come back; no more can wait, so try again later",
                retry_after_s=RETRY_UNKNOWN_S,
            )
        now = self._now()
        for ask in asks:
            self._waiting[ask.seq] = Stranded(SequenceState(ask, len(self._waiting), asks[0].seq, Times(now)), listener)

    def finish(self, seq: SequenceId) -> None:
        self._waiting.pop(seq, None)

    def cancel(self, seqs: Sequence[SequenceId]) -> None:
        for seq in seqs:
            self._waiting.pop(seq, None)
