"""A scheduler, its stages and their clients on a virtual clock; watches over what must hold at every moment."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.errors import AtCapacity
from cluster.steps import Draw, Drop, StepDone, StepFailed, StepOutcome
from cluster.types import SequenceId, StepId
from coordinator.events import Event, SequenceDisplaced, SequenceEnded, SequenceExpired, SequenceFailed, TokenDrawn
from coordinator.lanes import Lane
from coordinator.parking import Parking, Stranded
from coordinator.scheduler import Scheduler
from coordinator.sequence import SequenceAsk
from tests.simulation.stages import END, Stages, token_at

TICK_S = 0.1
"""How often deadlines are looked at."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Somebody asks at some time, and perhaps goes away."""

    at_s: float
    ask: SequenceAsk
    leaves_s: float | None = None


@dataclass(frozen=True, slots=True)
class Break:
    """The plan breaks at some time, and another one takes over later; who waits longer than the grace is told."""

    at_s: float
    back_s: float
    scheduler: Scheduler
    stages: Stages
    grace_s: float = 60.0


@dataclass(slots=True)
class Life:
    """What became of a request."""

    arrival: Arrival
    tokens_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end: str = ""  # how it ended
    end_s: float = 0.0
    drops: int = 0  # steps that threw it out of the caches before its end
    breaks: int = 0  # plans that broke before its end

    @property
    def first_token_s(self) -> float:
        return self.tokens_s[0] - self.arrival.at_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.tokens_s)]


def expected_answer(ask: SequenceAsk) -> list[int]:
    """What it draws when nothing else is computed."""
    answer: list[int] = []
    while len(answer) < ask.max_tokens:
        banned = tuple(ask.eos_ids) if len(answer) < ask.min_tokens else ()
        draw = Draw(ask.sampling, len(ask.prompt), banned)
        answer.append(token_at(ask.sampling.seed, len(ask.prompt) + len(answer), draw))
        if answer[-1] in ask.eos_ids:
            break
    return answer


_What = Arrival | SequenceId | StepOutcome | Break | None


class World:
    """Run it once."""

    def __init__(
        self, scheduler: Scheduler, stages: Stages, arrivals: Iterable[Arrival], breaks: Iterable[Break] = ()
    ) -> None:
        self.scheduler = scheduler
        self.stages = stages
        self._breaks = tuple(breaks)
        self._parking: Parking | None = None
        self._room = stages.room
        self.lives = {arrival.ask.seq: Life(arrival) for arrival in arrivals}
        self._now = 0.0
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, _What]] = []
        self._sent_s: dict[StepId, float] = {}
        self.in_flight: list[tuple[float, int]] = []  # with each new step

    def run(self) -> dict[SequenceId, Life]:
        """Until nothing is left to happen."""
        for life in self.lives.values():
            self._plan(life.arrival.at_s, life.arrival)
            if life.arrival.leaves_s is not None:
                self._plan(life.arrival.leaves_s, life.arrival.ask.seq)
        for broken in self._breaks:
            self._plan(broken.at_s, broken)
        self._plan(TICK_S, None)
        while self._agenda:
            self._now, _, what = heapq.heappop(self._agenda)
            match what:
                case None:
                    self._tick()
                case Arrival():
                    self._submit(what)
                case int():
                    self._leave(what)
                case Break() if self._parking is None:
                    self._break(what)
                case Break():
                    self._go_on(what)
                case _:
                    self._hear(self.scheduler.complete(what, self._now, self._away_s(what)))
            self._dispatch()
        self._check_idle()
        return self.lives

    def _plan(self, at_s: float, what: _What) -> None:
        heapq.heappush(self._agenda, (at_s, next(self._order), what))

    def _away_s(self, outcome: StepOutcome) -> float:
        elapsed_s = self._now - self._sent_s.pop(outcome.step)
        marks = outcome.marks if isinstance(outcome, StepDone) else ()
        return elapsed_s - sum(mark.queue_s + mark.compute_s for mark in marks)

    def _break(self, what: Break) -> None:
        """What was under way is never heard of again."""
        self._agenda = [item for item in self._agenda if not isinstance(item[2], StepDone | StepFailed)]
        heapq.heapify(self._agenda)
        self._sent_s.clear()
        self._parking = Parking(self._room.context_tokens, what.grace_s, lambda: self._now)
        stranded = self.scheduler.strand()
        for state in stranded:
            self.lives[state.ask.seq].breaks += 1
        self._parking.take([Stranded(state, self._listen) for state in stranded])
        assert self.scheduler.next_step(self._now) is None
        assert (self.scheduler.running, self.scheduler.waiting, self.scheduler.reserved_tokens) == (0, 0, 0)
        self._plan(what.back_s, what)

    def _go_on(self, what: Break) -> None:
        assert self._parking is not None
        if self._parking.is_over:
            self._parking.end("no machine came back")
        stranded, self._parking = self._parking.leave(), None
        self.scheduler, self.stages = what.scheduler, what.stages
        self._hear(self.scheduler.adopt([one.state for one in stranded], self._now))

    def _listen(self, event: Event) -> None:
        self._hear([event])

    def _tick(self) -> None:
        if self._parking is not None:
            self._parking.expire()
        else:
            self._hear(self.scheduler.expire(self._now))
        for life in self.lives.values():
            limits = life.arrival.ask.deadlines
            overdue_s = self._now - life.arrival.at_s - limits.total_s
            assert life.end or overdue_s < TICK_S + 1e-9, f"{life} outlives its deadline"
        if any(not life.end for life in self.lives.values()):
            self._plan(self._now + TICK_S, None)

    def _submit(self, arrival: Arrival) -> None:
        try:
            if self._parking is not None:
                self._parking.submit([arrival.ask], self._listen)
            else:
                self._hear(self.scheduler.submit([arrival.ask], self._now))
        except AtCapacity:
            self._end(arrival.ask.seq, "turned away")

    def _leave(self, seq: SequenceId) -> None:
        if not self.lives[seq].end:
            if self._parking is not None:
                self._parking.cancel([seq])
            else:
                self.scheduler.cancel(seq)
            self._end(seq, "cancelled")

    def _dispatch(self) -> None:
        if self._parking is not None:
            return
        while (step := self.scheduler.next_step(self._now)) is not None:
            for verb in step.verbs:
                if isinstance(verb, Drop):
                    self.lives[verb.seq].drops += not self.lives[verb.seq].end
            at_s, outcome = self.stages.run(step, self._now)
            assert self.scheduler.reserved_tokens >= sum(
                held for seq, held in self.stages.held.items() if not self.lives[seq].end
            ), "a running sequence has more in the caches than was promised to it"
            self._plan(at_s, outcome)
            self._sent_s[step.id] = self._now
            self.in_flight.append((self._now, self.scheduler.in_flight))
        if not (self.scheduler.running or self.scheduler.waiting or self.scheduler.in_flight):
            self._check_idle()

    def _check_idle(self) -> None:
        """Conservation: all that was taken has been given back."""
        scheduler = self.scheduler
        assert not self.stages.held, f"the caches of {self.stages.held} were never freed"
        assert (scheduler.running, scheduler.waiting, scheduler.in_flight, scheduler.reserved_tokens) == (0, 0, 0, 0)

    def _hear(self, events: Iterable[Event]) -> None:
        for event in events:
            life = self.lives[event.seq]
            assert not life.end, f"{event} after its end: {life.end}"
            match event:
                case TokenDrawn(_, token):
                    life.tokens.append(token)
                    life.tokens_s.append(self._now)
                case SequenceEnded(seq, reason):
                    self._end(seq, reason.value)
                case SequenceFailed(seq, reason):
                    self._end(seq, reason)
                case SequenceExpired(seq, limit):
                    self._end(seq, limit.value)
                case SequenceDisplaced(seq):
                    assert not life.tokens, "a request that had begun made room"
                    self._end(seq, "displaced")

    def _end(self, seq: SequenceId, how: str) -> None:
        life = self.lives[seq]
        life.end, life.end_s = how, self._now
        ask = life.arrival.ask
        if how in ("stop", "length"):
            assert life.tokens == expected_answer(ask), f"{seq} drew other tokens than alone"
            assert (life.tokens[-1] == END and END in ask.eos_ids) == (how == "stop")
        if ask.lane is Lane.INTERACTIVE and not ask.open_ended:
            assert life.drops == 0, "it was promised its worst case"
