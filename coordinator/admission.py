"""Which sequences have room in the caches, and who gives room back when it runs out.

The same on every stage, and counted in tokens: what is promised to the running sequences never exceeds the room. A
request that names its max_tokens is promised its worst case, and an interactive one of those is never thrown out. The
others are promised what answers usually take; who needs more is given more, and where there is none, the junior
ones among these start again later. The most senior sequence of all can always go on, so all come to their end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cluster.errors import RequestError
from cluster.limits import SEQUENCES_MAX
from cluster.rewinding import EXACT, Rewind
from cluster.types import SequenceId
from coordinator.crowding import QueueLimits
from coordinator.events import SequenceDisplaced
from coordinator.lanes import Lane
from coordinator.promises import Promises
from coordinator.queue import Queue
from coordinator.sequence import SequenceAsk, SequenceState

GROWTH_TOKENS: Final = 64
"""By which a promise grows: a second or two of an answer, so that promises are seldom looked at."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the installed plan offers."""

    stages: int
    kv_tokens: int
    context_tokens: int
    sequences: int = SEQUENCES_MAX  # live at once, whatever their length
    rewind: Rewind = EXACT  # where sequences can be cut back to


def check_lengths(asks: Sequence[SequenceAsk], context_tokens: int) -> None:
    """RequestError for what could not be computed even alone."""
    for ask in asks:
        if ask.worst_case_tokens > context_tokens:
            raise RequestError(
                f"{len(ask.prompt)} prompt tokens and {ask.max_tokens} to generate exceed the context of "
                f"{context_tokens} tokens",
                code="context_length_exceeded",
            )


class Admission:
    """The waiting and the running sequences of one installed plan. Where a method returns sequences, these were thrown
    out: they wait again, and their caches are to be dropped."""

    def __init__(self, room: Room, promises: Promises, limits: QueueLimits | None = None) -> None:
        self._room = room
        self._queue = Queue(limits)
        self._promises = promises
        self._reserved = 0
        self.running: dict[SequenceId, SequenceState] = {}
        self.restarts = 0  # how often a sequence was thrown out

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def reserved_tokens(self) -> int:
        return self._reserved

    # -- Coming ------------------------------------------------------------------------------------------

    def make_room(self, asks: Sequence[SequenceAsk], now: float) -> list[SequenceDisplaced]:
        """Who has left the queue so that these choices of one request may wait in it. Raises where they can never run,
        or where the queue is full."""
        check_lengths(asks, min(self._room.context_tokens, self._room.kv_tokens))
        return self._queue.make_room(asks, now)

    def why_not(self, state: SequenceState) -> str | None:
        """Why a sequence of another plan cannot go on in this one, which may be smaller; None when it can. One whose
        length nobody named ends where the context does."""
        ask, room_tokens = state.ask, min(self._room.context_tokens, self._room.kv_tokens)
        if ask.open_ended and ask.worst_case_tokens > room_tokens > len(state.tokens):
            state.ask = ask = replace(ask, max_tokens=room_tokens - len(ask.prompt))
        if ask.worst_case_tokens <= room_tokens:
            return None
        return (
            f"it may take {ask.worst_case_tokens} tokens, and the machines that are left hold a context of "
            f"{room_tokens}"
        )

    def submit(self, state: SequenceState) -> None:
        self._queue.push(state)

    def admit(self, now: float) -> list[SequenceState]:
        """Let in whoever's turn it is while there is room, after the running ones have what they need."""
        thrown = self._grow()
        if any(not state.has_room for state in self.running.values()):
            return thrown
        while (state := self._next(now, thrown)) is not None:
            tokens = self._promises.tokens_for(state)
            self._queue.take(state, tokens, now)
            state.begin(tokens, now)
            self.running[state.ask.seq] = state
            self._reserved += tokens
        return thrown

    def _next(self, now: float, thrown: list[SequenceState]) -> SequenceState | None:
        """Who comes in now. What does not fit is not overtaken within its lane, so it cannot starve; and an interactive
        request is not overtaken by a batch one."""
        for head in list(self._queue.heads()):
            if head.in_flight:
                return None  # rows from before it was thrown out are on their way back
            tokens = self._promises.tokens_for(head)
            if head.ask.lane is Lane.INTERACTIVE and not self._fits(tokens):
                thrown += self._throw_out_batch(tokens)
            if self._fits(tokens):
                return head
            if head.ask.lane is Lane.INTERACTIVE or self._queue.is_impatient(head, now):
                return None
        return None

    def _fits(self, tokens: int) -> bool:
        return self._reserved + tokens <= self._room.kv_tokens and len(self.running) < self._room.sequences

    # -- Growing -----------------------------------------------------------------------------------------

    def _grow(self) -> list[SequenceState]:
        """More room for those who have outgrown their promise, the senior ones first. Who finds none waits."""
        thrown: list[SequenceState] = []
        for state in sorted(self._outgrown(), key=lambda state: state.seniority):
            if state.ask.seq not in self.running:
                continue
            for junior in self._juniors(state):
                if self._extend(state):
                    break
                self._throw_out(junior)
                thrown.append(junior)
            self._extend(state)
        return thrown

    def _outgrown(self) -> Iterator[SequenceState]:
        return (state for state in self.running.values() if not state.has_room and state.settled)

    def _extend(self, state: SequenceState) -> bool:
        """Whether it has room now."""
        if not state.has_room:
            wanted = min(len(state.tokens) + GROWTH_TOKENS, state.ask.worst_case_tokens)
            more = min(wanted - state.promised, self._room.kv_tokens - self._reserved)
            if state.promised + more >= len(state.tokens):
                state.promised += more
                self._reserved += more
        return state.has_room

    def _juniors(self, state: SequenceState) -> list[SequenceState]:
        """Those that make room for it, the most junior one first. To the others their worst case was promised."""
        yielding = [
            other
            for other in self.running.values()
            if other.seniority > state.seniority
            and other.settled
            and (other.ask.open_ended or other.ask.lane is Lane.BATCH)
        ]
        return sorted(yielding, key=lambda other: other.seniority, reverse=True)

    def _throw_out_batch(self, tokens: int) -> list[SequenceState]:
        """Batch sequences, the latest first, as many as an interactive one needs; nobody where that is not enough. The
        earliest one stays, and nobody is thrown out for this twice, so the batch lane goes on."""
        batch = [state for state in self.running.values() if state.ask.lane is Lane.BATCH]
        batch.sort(key=lambda state: state.number)
        yielding = [state for state in batch[1:] if state.settled and state.thrown_out == 0]
        leaving: list[SequenceState] = []
        tokens_left, places_left = self._room.kv_tokens - self._reserved, self._room.sequences - len(self.running)
        while (tokens_left < tokens or places_left < 1) and yielding:
            leaving.append(yielding.pop())
            tokens_left, places_left = tokens_left + leaving[-1].promised, places_left + 1
        if tokens_left < tokens or places_left < 1:
            return []
        for state in leaving:
            self._throw_out(state)
        return leaving

    # -- Going -------------------------------------------------------------------------------------------

    def _throw_out(self, state: SequenceState) -> None:
        self._release(state)
        state.thrown_out += 1
        self.restarts += 1
        self._queue.push_front(state)

    def leave(self, state: SequenceState, *, well: bool) -> bool:
        """It has ended, failed or was cancelled. Returns whether the stages may hold something of it."""
        if well:
            self._promises.note(state)
        self._queue.settle(state)
        if state.ask.seq not in self.running:
            self._queue.remove(state)
            return False
        self._release(state)
        return True

    def _release(self, state: SequenceState) -> None:
        del self.running[state.ask.seq]
        self._reserved -= state.promised
        state.promised = 0

    def clear(self) -> None:
        self.running.clear()
        self._queue.clear()
        self._reserved = 0
