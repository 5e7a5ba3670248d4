"""Decides what each step computes. A pure state machine: it is told what happened and answers with steps and
events; it has no clock, no tasks and no sockets.

Decode rows go first, then prefill chunks within a token budget. With P stages, P steps are in flight and the
decoding sequences are spread over them. Room in the cache is reserved for the worst case at admission, so a
running sequence never has to be thrown out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.errors import AtCapacity, RequestError
from cluster.limits import QUEUED_REQUESTS_MAX, SEQUENCES_MAX, STEP_ROWS_MAX
from cluster.steps import CacheVerb, Drop, Row, Step, StepDone, StepFailed, StepOutcome, Trim
from cluster.types import SequenceId, StepId
from coordinator.sequence import EndReason, RunningSequence, SequenceAsk

PREFILL_BUDGET_TOKENS = 512
"""New tokens in one step. A chunk of this size keeps matrix products efficient and makes running answers wait
for one chunk, not for a whole prompt."""


@dataclass(frozen=True, slots=True)
class TokenDrawn:
    seq: SequenceId
    token: int


@dataclass(frozen=True, slots=True)
class SequenceEnded:
    seq: SequenceId
    reason: EndReason


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    seq: SequenceId
    reason: str


Event = TokenDrawn | SequenceEnded | SequenceFailed


@dataclass(frozen=True, slots=True)
class Room:
    """What the installed plan offers."""

    stages: int
    kv_tokens: int
    context_tokens: int
    sequences: int = SEQUENCES_MAX  # live at once, whatever their length


class Scheduler:
    """The sequences of one installed plan."""

    def __init__(self, room: Room, *, budget_tokens: int = PREFILL_BUDGET_TOKENS) -> None:
        self._room = room
        self._budget = budget_tokens
        self._waiting: deque[SequenceAsk] = deque()
        self._running: dict[SequenceId, RunningSequence] = {}
        self._in_flight: dict[StepId, tuple[Row, ...]] = {}
        self._verbs: list[CacheVerb] = []
        self._reserved = 0
        self._next_step = 0

    # -- What is asked -----------------------------------------------------------------------------------

    def submit(self, asks: Sequence[SequenceAsk]) -> None:
        """Queue the choices of one request: all of them, or AtCapacity and none."""
        for ask in asks:
            if ask.worst_case_tokens > self._room.context_tokens:
                raise RequestError(
                    f"{len(ask.prompt)} prompt tokens and {ask.max_tokens} to generate exceed the context of "
                    f"{self._room.context_tokens} tokens",
                    code="context_length_exceeded",
                )
        if len(self._waiting) + len(asks) > QUEUED_REQUESTS_MAX:
            raise AtCapacity(
                f"{len(self._waiting)} requests are waiting already; try again in a few seconds", retry_after_s=5.0
            )
        self._waiting.extend(asks)

    def cancel(self, seq: SequenceId) -> None:
        """Nobody wants this sequence any more; its cache is freed on every stage with the next step."""
        self._waiting = deque(ask for ask in self._waiting if ask.seq != seq)
        if seq in self._running:
            self._finish(self._running[seq])

    def fail_all(self, reason: str) -> list[Event]:
        """The pipeline is gone: everything ends here."""
        lost = [*self._running, *(ask.seq for ask in self._waiting)]
        self._running.clear()
        self._waiting.clear()
        self._in_flight.clear()
        self._verbs.clear()
        self._reserved = 0
        return [SequenceFailed(seq, reason) for seq in lost]

    # -- What to do next ---------------------------------------------------------------------------------

    def next_step(self) -> Step | None:
        """The next step to dispatch, or None until an outcome or a request changes something."""
        if len(self._in_flight) >= self._room.stages:
            return None
        self._admit()
        self._rewind()
        rows = tuple(self._rows())
        verbs, self._verbs = tuple(self._verbs), []
        if not rows and not verbs:
            return None
        step = Step(StepId(self._next_step), verbs, rows)
        self._next_step += 1
        self._in_flight[step.id] = rows
        return step

    def _admit(self) -> None:
        """First come, first served: a large request at the head is not overtaken, so it cannot starve."""
        while self._waiting and len(self._running) < self._room.sequences:
            need = self._waiting[0].worst_case_tokens
            if self._reserved + need > self._room.kv_tokens:
                return
            ask = self._waiting.popleft()
            self._running[ask.seq] = RunningSequence(ask)
            self._reserved += need

    def _rewind(self) -> None:
        """Sequences hurt by a failed step are cut back once nothing of them is under way."""
        for sequence in self._running.values():
            if sequence.rewind_to is not None and sequence.in_flight == 0:
                self._verbs.append(Trim(sequence.ask.seq, sequence.rewind_to))
                sequence.trimming_to, sequence.rewind_to = sequence.rewind_to, None

    def _rows(self) -> Iterator[Row]:
        suspect = next((s for s in self._running.values() if s.alone and (s.decoding or s.prefilling)), None)
        if suspect is not None:
            yield suspect.take_row(self._budget)
            return
        decoding = [sequence for sequence in self._running.values() if sequence.decoding]
        alive = sum(not sequence.over and sequence.generated > 0 for sequence in self._running.values())
        share = min(-(-alive // self._room.stages), STEP_ROWS_MAX, self._budget)
        taken = 0
        for sequence in decoding[:share]:
            yield sequence.take_row(1)
            taken += 1
        left = self._budget - taken
        for sequence in self._running.values():
            if left <= 0 or taken >= STEP_ROWS_MAX:
                return
            if sequence.prefilling and not sequence.alone:
                row = sequence.take_row(left)
                left -= len(row.tokens)
                taken += 1
                yield row

    # -- What happened -----------------------------------------------------------------------------------

    def complete(self, outcome: StepOutcome) -> list[Event]:
        """A step came back. Outcomes of unknown steps are ignored: fail_all may have overtaken them."""
        rows = self._in_flight.pop(outcome.step, None)
        if rows is None:
            return []
        for row in rows:
            if row.seq in self._running:
                self._running[row.seq].in_flight -= 1
        for kept in outcome.honoured:
            if kept.seq in self._running:
                self._running[kept.seq].cut_to(kept.length)
        match outcome:
            case StepDone():
                return self._done(outcome, rows)
            case StepFailed():
                return self._failed(outcome, rows)

    def _done(self, outcome: StepDone, rows: tuple[Row, ...]) -> list[Event]:
        events: list[Event] = []
        for row in rows:
            if row.seq in self._running:
                self._running[row.seq].alone = False  # it does not fail by itself
        for drawn in outcome.drawn:
            running = self._running.get(drawn.seq)
            if running is None or running.over:
                continue
            reason = running.accept(drawn.token)
            events.append(TokenDrawn(drawn.seq, drawn.token))
            if reason is not None:
                events.append(SequenceEnded(drawn.seq, reason))
                self._finish(running)
        return events

    def _failed(self, outcome: StepFailed, rows: tuple[Row, ...]) -> list[Event]:
        """The blamed sequences fail. Where nobody is to blame alone, each row is tried again by itself."""
        events: list[Event] = []
        for row in rows:
            sequence = self._running.get(row.seq)
            if sequence is None or sequence.over:
                continue
            # A chunk that followed the failed one does not continue the cache. That is not the sequence's fault.
            if row.seq in outcome.seqs and sequence.rewind_to is None:
                events.append(SequenceFailed(row.seq, outcome.reason))
                self._finish(sequence)
            else:
                sequence.alone = True
                sequence.rewind(row.start)
        return events

    def _finish(self, sequence: RunningSequence) -> None:
        """Free the sequence's room. Steps under way still hold rows of it, but they precede the Drop everywhere."""
        sequence.over = True
        del self._running[sequence.ask.seq]
        self._reserved -= sequence.ask.worst_case_tokens
        self._verbs.append(Drop(sequence.ask.seq))

    # -- What there is -----------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def reserved_tokens(self) -> int:
        return self._reserved
