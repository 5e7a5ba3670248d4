"""Decides what each step computes. A pure state machine: it is told what happened, and when, and answers with steps
and events; it has no clock, no tasks and no sockets.

Decode rows go first, then chunks of prompts. With P stages, P steps are in flight, more where links are slow, and the
decoding sequences are spread over them. Who has room in the caches is `admission`'s to say, how large chunks are
`pacing`'s, and how many steps are in flight `spreading`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.limits import STEP_ROWS_MAX, STEP_TOKENS_MAX
from cluster.steps import CacheVerb, Row, Step, StepDone, StepFailed, StepOutcome, Trim
from cluster.types import SequenceId, StepId
from coordinator.admission import Admission, Room
from coordinator.crowding import QueueLimits
from coordinator.deadlines import Times
from coordinator.events import Event, PrefixCached, SequenceEnded, SequenceExpired, SequenceFailed, TokenDrawn
from coordinator.lanes import Lane, Turns
from coordinator.pacing import Pace
from coordinator.prefix_cache import PrefixCache, PrefixStatus
from coordinator.promises import Promises
from coordinator.sequence import SequenceAsk, SequenceState
from coordinator.spreading import Spread


@dataclass(frozen=True, slots=True)
class _Dispatched:
    """A step on its way."""

    rows: tuple[Row, ...]
    decoding: int  # how many of the rows compute a drawn token; the others are chunks
    paced: bool  # somebody read along when its chunks were chosen


class Scheduler:
    """The sequences of one installed plan. `now` is any clock's time in seconds that never goes back."""

    def __init__(
        self,
        room: Room,
        *,
        budget_tokens: int = STEP_TOKENS_MAX,
        pace: Pace | None = None,
        prefixes: PrefixCache | None = None,
        promises: Promises | None = None,
        queue_limits: QueueLimits | None = None,
    ) -> None:
        self._room = room
        self._budget = budget_tokens
        self._admission = Admission(room, promises or Promises(), queue_limits)
        self._prefixes = prefixes or PrefixCache(room)
        self._turns = Turns()  # of prompts to be computed
        self._pace = pace or Pace(room.stages)
        self._spread = Spread(room.stages, self._pace)
        self._steps = room.stages  # at most so many in flight, as of the last choice
        self._live: dict[SequenceId, SequenceState] = {}  # waiting or running
        self._in_flight: dict[StepId, _Dispatched] = {}
        self._verbs: list[CacheVerb] = []
        self._next_step = 0
        self._arrived = 0

    # -- What is asked -----------------------------------------------------------------------------------

    def submit(self, asks: Sequence[SequenceAsk], now: float) -> list[Event]:
        """Queue the choices of one request: all of them, or AtCapacity and none. Others may have to leave a full queue
        for them."""
        events: list[Event] = []
        for displaced in self._admission.make_room(asks, now):
            del self._live[displaced.seq]
            events.append(displaced)
        for ask in asks:
            state = self._live[ask.seq] = SequenceState(ask, self._arrived, asks[0].seq, Times(now))
            self._arrived += 1
            self._admission.submit(state)
        return events

    def cancel(self, seq: SequenceId) -> None:
        """Nobody wants this sequence any more; its cache is freed on every stage with the next step."""
        if seq in self._live:
            self._finish(self._live[seq])

    def finish(self, seq: SequenceId) -> None:
        """It has ended well, as whoever reads it found. That teaches how long answers are; a cancelled one does not."""
        if seq in self._live:
            self._finish(self._live[seq], well=True)

    def expire(self, now: float) -> list[Event]:
        """Whoever took too long ends here."""
        events: list[Event] = []
        for state in list(self._live.values()):
            deadlines = state.ask.deadlines
            limit = deadlines.passed(state.times, now)
            if limit is not None:
                asked = limit in deadlines.asked
                events.append(SequenceExpired(state.ask.seq, limit, deadlines.seconds(limit), asked))
                self._finish(state)
        return events

    def fail_all(self, reason: str) -> list[Event]:
        """The pipeline is gone: everything ends here."""
        return [SequenceFailed(state.ask.seq, reason) for state in self.strand()]

    def strand(self) -> list[SequenceState]:
        """The pipeline is gone. Everything that was live leaves, in the order of its arrival, with its tokens."""
        stranded = list(self._live.values())
        for state in stranded:
            state.strand()
        self._live.clear()
        self._admission.clear()
        self._prefixes.clear()
        self._in_flight.clear()
        self._verbs.clear()
        return stranded

    def adopt(self, stranded: Sequence[SequenceState], now: float) -> list[Event]:
        """Go on with sequences whose plan is gone, in their order and before whatever comes. They draw the tokens that
        they would have drawn there. Those that are too long for this plan end here."""
        events: list[Event] = []
        for state in stranded:
            reason = self._admission.why_not(state)
            if reason is not None:
                events.append(SequenceFailed(state.ask.seq, reason))
                continue
            state.times.go_on(now)
            state.number = self._arrived
            self._live[state.ask.seq] = state
            self._arrived += 1
            self._admission.submit(state)
        return events

    # -- What to do next ---------------------------------------------------------------------------------

    def next_step(self, now: float) -> Step | None:
        """The next step to dispatch, or None until an outcome or a request changes something."""
        if len(self._in_flight) >= self._steps:
            return None
        # Drops come first in a step on every stage, so their room counts as free from here on.
        for state in self._admission.admit(now):
            self._verbs += self._prefixes.leave(state)
        self._verbs += self._prefixes.begin(self._admission.running, self._admission.reserved_tokens)
        self._rewind()
        dispatched = self._choose()
        self._prefixes.sent(dispatched.rows)
        verbs, self._verbs = tuple(self._verbs), []
        if not dispatched.rows and not verbs:
            return None
        step = Step(StepId(self._next_step), verbs, dispatched.rows)
        self._next_step += 1
        self._in_flight[step.id] = dispatched
        return step

    def _rewind(self) -> None:
        """Sequences hurt by a failed step are cut back once nothing of them is under way."""
        for state in self._admission.running.values():
            if state.rewind_to is not None and state.in_flight == 0:
                self._verbs.append(Trim(state.ask.seq, state.rewind_to))
                state.trimming_to, state.rewind_to = state.rewind_to, None

    def _choose(self) -> _Dispatched:
        running = self._admission.running.values()
        suspect = next((state for state in running if state.alone and (state.decoding or state.prefilling)), None)
        if suspect is not None:
            return _Dispatched((suspect.take_row(self._budget),), 0, paced=True)
        answering = [state for state in running if state.answering]
        decoding = [state for state in answering if state.decoding]
        self._steps = self._spread.steps(len(answering))
        share = min(-(-len(answering) // self._steps), STEP_ROWS_MAX, self._budget)
        rows = [state.take_row(1) for state in decoding[:share]]
        readers = sum(state.ask.lane is Lane.INTERACTIVE for state in answering)
        prompts = [state for state in running if state.prefilling and not state.alone]
        if readers:
            lengths = [state.own_tokens for state in prompts]
            tokens = self._pace.beside_answers(share, len(rows), lengths, readers)
        else:
            tokens = self._pace.alone(sum(state.unsent for state in prompts))
        chunks = self._chunks(prompts, STEP_ROWS_MAX - len(rows), min(tokens, self._budget - len(rows)))
        return _Dispatched((*rows, *chunks), len(rows), paced=readers > 0)

    def _chunks(self, prompts: list[SequenceState], rows: int, tokens: int) -> Iterator[Row]:
        """By lane and client in turns. A client's own in the order in which they came, but a prompt is overtaken by
        shorter ones that came while it could have been computed."""
        while prompts and rows > 0 and tokens > 0:
            lane = self._turns.lanes({state.ask.lane for state in prompts})[0]
            present = [state for state in prompts if state.ask.lane is lane]
            client = self._turns.client(lane, dict.fromkeys(state.ask.client for state in present))
            state = min((state for state in present if state.ask.client == client), key=self._could_be_computed_s)
            row = state.take_row(tokens)
            prompts.remove(state)
            rows, tokens = rows - 1, tokens - len(row.tokens)
            self._turns.serve(lane, client, len(row.tokens))
            yield row

    def _could_be_computed_s(self, state: SequenceState) -> tuple[float, int]:
        return state.times.submitted_s + self._pace.token_s * state.own_tokens, state.number

    # -- What happened -----------------------------------------------------------------------------------

    def complete(self, outcome: StepOutcome, now: float, away_s: float = 0.0) -> list[Event]:
        """A step came back; it was on links for so long. Outcomes of unknown steps are ignored: fail_all may have
        overtaken them."""
        dispatched = self._in_flight.pop(outcome.step, None)
        if dispatched is None:
            return []
        rows = dispatched.rows
        for row in rows:
            if row.seq in self._live:
                self._live[row.seq].in_flight -= 1
        for kept in outcome.honoured:
            if kept.seq in self._admission.running:
                self._admission.running[kept.seq].cut_to(kept.length)
                self._prefixes.cut(kept.seq, kept.length)
        match outcome:
            case StepDone():
                chunk_tokens = sum(len(row.tokens) for row in rows[dispatched.decoding :])
                self._pace.note(outcome.marks, dispatched.decoding, chunk_tokens, paced=dispatched.paced)
                self._spread.note(outcome.marks, away_s, dispatched.decoding, chunk_tokens)
                return self._done(outcome, rows, now)
            case StepFailed():
                return self._failed(outcome, rows)

    def _done(self, outcome: StepDone, rows: tuple[Row, ...], now: float) -> list[Event]:
        events: list[Event] = []
        for row in rows:
            if row.seq in self._live:
                self._live[row.seq].alone = False  # it does not fail by itself
        for drawn in outcome.drawn:
            state = self._live.get(drawn.seq)
            if state is None:
                continue
            reason = state.accept(drawn.token, now)
            if state.generated == 1:
                events += self._prompt_done(state)
            events.append(TokenDrawn(drawn.seq, drawn.token))
            if reason is not None:
                events.append(SequenceEnded(drawn.seq, reason))
                self._finish(state, well=True)
        return events

    def _failed(self, outcome: StepFailed, rows: tuple[Row, ...]) -> list[Event]:
        """The blamed sequences fail. Where nobody is to blame alone, each row is tried again by itself."""
        events: list[Event] = []
        for row in rows:
            state = self._live.get(row.seq)
            if state is None:
                continue
            # A chunk that followed the failed one does not continue the cache. That is not the sequence's fault.
            if row.seq in outcome.seqs and state.rewind_to is None:
                events.append(SequenceFailed(row.seq, outcome.reason))
                self._finish(state, spoilt=True)
            else:
                state.alone = True
                state.rewind(row.start)
        return events

    def _prompt_done(self, state: SequenceState) -> list[Event]:
        self._prefixes.count(state)
        return [PrefixCached(state.ask.seq, state.cached)] if state.cached else []

    def _finish(self, state: SequenceState, *, well: bool = False, spoilt: bool = False) -> None:
        """Free the sequence's room. Steps under way still hold rows of it, but they precede the next verbs everywhere.
        What the stages have of it may serve others, unless it is spoilt."""
        del self._live[state.ask.seq]
        if self._admission.leave(state, well=well):
            self._verbs += self._prefixes.leave(state, spoilt=spoilt)

    # -- What there is -----------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return self._admission.waiting

    @property
    def running(self) -> int:
        return len(self._admission.running)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def prefixes(self) -> PrefixStatus:
        return self._prefixes.status

    @property
    def reserved_tokens(self) -> int:
        return self._admission.reserved_tokens

    @property
    def restarts(self) -> int:
        """How often a sequence had to give its room back and begin again."""
        return self._admission.restarts
