"""What sequences leave in the caches for those that begin alike.

An ended sequence stays on the stages as it is, for as long as nobody needs its room: retained sequences take what the
plan promised and nobody has reserved, and the least recently used go first. A new sequence begins as a fork of the one
that shares most with it, retained or running; it takes a retained one's place where that would have nothing more to
offer. Pure, like the scheduler that asks it: answers with verbs. What stages honour is told by outcomes; what is
foreseen here only decides whom to ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.rewinding import EXACT, WaysBack
from cluster.steps import CacheVerb, Drop, Fork, Move, Row, Trim
from cluster.types import SequenceId
from coordinator.admission import Room
from coordinator.lanes import Lane
from coordinator.prefixes import PrefixTree
from coordinator.sequence import SequenceState

SHARED_TOKENS_MIN: Final = 16
"""A shorter beginning is computed sooner than the stages are asked for it: that takes a trip through the pipeline."""

AWAITED_TOKENS_MIN: Final = 64
"""Who waits until another one has computed what both begin with takes two steps more than who computes it beside it."""


@dataclass(slots=True, eq=False)
class _Held:
    """What the stages hold of a sequence, as far as the steps tell that were sent."""

    length: int
    ways_back: WaysBack[bool]


@dataclass(frozen=True, slots=True)
class _Source:
    """Whom to fork, and how much of it."""

    seq: SequenceId
    length: int


@dataclass(frozen=True, slots=True)
class PrefixStatus:
    """For the status page. Tokens of prompts count when their first token is drawn."""

    enabled: bool
    retained_sequences: int
    retained_tokens: int
    prompt_tokens: int  # of all prompts so far
    cached_tokens: int  # of these, what was not computed again


class PrefixCache:
    """The retained and the running sequences of one installed plan, by what they begin with."""

    def __init__(
        self,
        room: Room,
        *,
        enabled: bool = True,
        shared_tokens_min: int = SHARED_TOKENS_MIN,
        awaited_tokens_min: int = AWAITED_TOKENS_MIN,
    ) -> None:
        self._room = room
        self._enabled = enabled
        self._least = shared_tokens_min
        self._least_awaited = awaited_tokens_min
        self._tree = PrefixTree()
        self._held: dict[SequenceId, _Held] = {}
        self._retained: dict[SequenceId, None] = {}  # the least recently used first
        self._retained_tokens = 0
        self._awaited: dict[SequenceId, _Source] = {}  # by who waits
        self._prompt_tokens = self._cached_tokens = 0

    @property
    def retained(self) -> tuple[SequenceId, ...]:
        """The least recently used first."""
        return tuple(self._retained)

    @property
    def status(self) -> PrefixStatus:
        return PrefixStatus(
            self._enabled, len(self._retained), self._retained_tokens, self._prompt_tokens, self._cached_tokens
        )

    # -- Beginning ---------------------------------------------------------------------------------------

    def begin(self, running: Mapping[SequenceId, SequenceState], reserved_tokens: int) -> list[CacheVerb]:
        """What the next step has to begin with, so that those who have just got room start from what there is, and
        nothing is retained in room that is promised to somebody."""
        spare_tokens, spare_places = self._room.kv_tokens - reserved_tokens, self._room.sequences - len(running)
        starts: list[CacheVerb] = []
        forked: set[SequenceId] = set()  # retained sequences that have to stay for this step
        for state in running.values():
            if state.fresh and not self._must_wait(state, running):
                forked_tokens = sum(self._held[seq].length for seq in forked)
                verb = self._start(state, spare_tokens - forked_tokens, spare_places - len(forked), forked)
                starts += [] if verb is None else [verb]
        # Room first: on a stage a fork must find it.
        return [*self._evict(spare_tokens, spare_places, forked), *starts]

    def _must_wait(self, state: SequenceState, running: Mapping[SequenceId, SequenceState]) -> bool:
        """Whether another one is computing what it begins with. Both would otherwise share the pipeline for the same
        work, so nobody is later for it."""
        if not self._enabled or state.ask.seq in self._retained:
            return False
        if (awaited := self._awaited.get(state.ask.seq)) is None:
            awaited = self._coming(state, running)
        if awaited is None or not self._is_coming(awaited, state, running):
            self._awaited.pop(state.ask.seq, None)
            return False
        self._awaited[state.ask.seq] = awaited
        if self._room.rewind != EXACT:
            # Later it could not be cut back to this point, so it stops there.
            running[awaited.seq].pause(awaited.length)
        return True

    def _coming(self, state: SequenceState, running: Mapping[SequenceId, SequenceState]) -> _Source | None:
        now = best.length if (best := self._best(state)) else 0
        for shared in self._tree.shared(state.ask.salt, state.tokens):
            coming = _Source(shared.seq, min(shared.length, len(state.tokens) - 1))
            if coming.length < now + self._least_awaited:
                return None
            if self._is_coming(coming, state, running):
                return coming
        return None

    def _is_coming(self, awaited: _Source, state: SequenceState, running: Mapping[SequenceId, SequenceState]) -> bool:
        source, held = running.get(awaited.seq), self._held.get(awaited.seq)
        return (
            source is not None
            and held is not None  # it may have been thrown out and let in again since
            and not source.alone
            and source.rewind_to is None
            and (source.ask.lane is Lane.INTERACTIVE or state.ask.lane is Lane.BATCH)
            and held.length < awaited.length
        )

    def _start(
        self, state: SequenceState, spare_tokens: int, spare_places: int, forked: set[SequenceId]
    ) -> CacheVerb | None:
        """From what it begins. `forked` gains the retained sequence that it is copied from."""
        seq = state.ask.seq
        if not self._enabled:
            state.start(0)
            return None
        verb: Fork | Move | Trim | None = None
        if seq in self._retained:  # it had to give its room back, and nobody has taken it
            self._release(seq)
            verb = Trim(seq, min(self._held[seq].length, len(state.tokens) - 1))
        elif (source := self._best(state)) is None:
            self._held[seq] = _Held(0, WaysBack(self._room.rewind))
        else:
            held = self._held[source.seq]
            self._held[seq] = _Held(source.length, held.ways_back.forked(source.length))
            fits = held.length <= spare_tokens and spare_places > 0
            if source.seq not in self._retained:
                verb = Fork(source.seq, seq, source.length)
            elif fits and not self._is_nothing_more(source):
                self._retained[source.seq] = self._retained.pop(source.seq)
                forked.add(source.seq)
                verb = Fork(source.seq, seq, source.length)
            else:
                self._forget(source.seq)
                forked.discard(source.seq)
                verb = Move(source.seq, seq, source.length)
        self._tree.put(seq, state.ask.salt, state.tokens)
        state.start(0 if verb is None else verb.length)
        return verb

    def _best(self, state: SequenceState) -> _Source | None:
        """Who has most of what the sequence begins with. The last token is left: it has to be computed to go on."""
        best = _Source(state.ask.seq, self._least - 1)
        for shared in self._tree.shared(state.ask.salt, state.tokens):
            asked = min(shared.length, len(state.tokens) - 1)
            if asked <= best.length:
                break
            held = self._held[shared.seq]
            length = held.ways_back.honoured(held.length, min(asked, held.length))
            if length > best.length:
                best = _Source(shared.seq, length)
        return best if best.length >= self._least else None

    def _is_nothing_more(self, source: _Source) -> bool:
        """A retained sequence that goes on as another one is missed by nobody, where that one can be cut back to it."""
        return self._room.rewind == EXACT and self._held[source.seq].length - source.length < self._least

    def _evict(self, tokens: int, sequences: int, forked: set[SequenceId]) -> Iterator[Drop]:
        for seq in list(self._retained):
            if self._retained_tokens <= tokens and len(self._retained) <= sequences:
                return
            if seq not in forked:
                self._forget(seq)
                yield Drop(seq)

    # -- Going on ----------------------------------------------------------------------------------------

    def sent(self, rows: Sequence[Row]) -> None:
        """These rows are on their way."""
        for row in rows:
            if (held := self._held.get(row.seq)) is not None:
                snapshot = True if held.ways_back.wants_snapshot(row.start, row.end) else None
                held.ways_back.grew(row.end, snapshot)
                held.length = row.end

    def cut(self, seq: SequenceId, length: int) -> None:
        """So much of a sequence was honoured."""
        if (held := self._held.get(seq)) is not None:
            held.length = length
            held.ways_back.cut(length)

    def count(self, state: SequenceState) -> None:
        """Its prompt is through."""
        self._prompt_tokens += len(state.ask.prompt)
        self._cached_tokens += state.cached or 0

    # -- Leaving -----------------------------------------------------------------------------------------

    def leave(self, state: SequenceState, *, spoilt: bool = False) -> list[CacheVerb]:
        """It computes nothing more, or not for now. What the stages have of it stays, unless nobody knows what that
        is. Rows that are still under way count as computed; where they fail, less is honoured."""
        seq = state.ask.seq
        self._awaited.pop(seq, None)
        if seq in self._retained:
            return []  # from before it last got room
        held = self._held.get(seq)
        if held is None or spoilt or not state.settled or held.length < self._least:
            self._forget(seq)
            return [Drop(seq)]
        tokens = state.tokens[: held.length]
        dropped = [other for other in self._outdone(state.ask.salt, tokens) if other != seq]
        for other in dropped:
            self._forget(other)
        self._tree.put(seq, state.ask.salt, tokens)
        self._retained[seq] = None
        self._retained_tokens += held.length
        return [Drop(other) for other in dropped]

    def _outdone(self, salt: str, tokens: Sequence[int]) -> list[SequenceId]:
        """Retained sequences that offer nothing that one with these tokens does not."""
        found = []
        for shared in self._tree.shared(salt, tokens):
            if shared.seq in self._retained and self._held[shared.seq].length <= len(tokens):
                whole = shared.length == len(tokens) == self._held[shared.seq].length
                if whole or self._is_nothing_more(_Source(shared.seq, shared.length)):
                    found.append(shared.seq)
        return found

    def clear(self) -> None:
        """The caches are gone."""
        self._tree.clear()
        self._held.clear()
        self._retained.clear()
        self._awaited.clear()
        self._retained_tokens = 0

    def _release(self, seq: SequenceId) -> None:
        del self._retained[seq]
        self._retained_tokens -= self._held[seq].length

    def _forget(self, seq: SequenceId) -> None:
        if seq in self._retained:
            self._release(seq)
        self._held.pop(seq, None)
        self._tree.remove(seq)
