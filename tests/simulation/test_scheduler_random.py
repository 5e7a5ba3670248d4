"""Thousands of random workloads through the scheduler and a pipeline that checks every row.

Requests come and go, clients cancel, steps fail with and without blame, trims keep less than asked. Whatever
happens: every sequence ends exactly once, no row starts anywhere but at its cache's end, the cache never holds
more than was promised, and nothing is left when all is over.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import pytest

from cluster.steps import Drawn, Drop, Fork, Honoured, Sampling, Step, StepDone, StepFailed, StepOutcome, Trim
from cluster.types import SequenceId
from coordinator.admission import Room
from coordinator.lanes import Lane
from coordinator.scheduler import Scheduler, SequenceEnded, SequenceFailed, TokenDrawn
from coordinator.sequence import SequenceAsk

END = 0
STEPS_MAX = 20_000


class CheckedStages:
    """The stages, one after another: what each holds, and an error for any row that does not continue it."""

    def __init__(self, rng: random.Random, room: Room) -> None:
        self._rng = rng
        self._room = room
        self._stages: list[dict[SequenceId, int]] = [{} for _ in range(room.stages)]

    @property
    def held(self) -> set[SequenceId]:
        return {seq for stage in self._stages for seq in stage}

    def run(self, step: Step) -> StepOutcome:
        kept: dict[SequenceId, int] = {}
        failure: StepFailed | None = None
        for index, stage in enumerate(self._stages):
            self._obey(step, stage, kept)
            if failure is None and (wrong := self._trouble(step, stage)):
                blamed = (step.rows[0].seq,) if len(step.rows) == 1 else ()
                failure = StepFailed(step.id, index, wrong, blamed)
            if failure is None:
                stage.update({row.seq: row.end for row in step.rows})
                assert sum(stage.values()) <= self._room.kv_tokens, "more is cached than was promised"
                assert len(stage) <= self._room.sequences, "more sequences are cached than were promised"
        honoured = tuple(Honoured(seq, length) for seq, length in kept.items())
        if failure is not None:
            return replace(failure, honoured=honoured)
        drawn = tuple(Drawn(row.seq, row.end, self._rng.choice([END, 5, 6, 7, 8])) for row in step.rows if row.draw)
        return StepDone(step.id, drawn, honoured, ())

    def _obey(self, step: Step, stage: dict[SequenceId, int], kept: dict[SequenceId, int]) -> None:
        for verb in step.verbs:
            match verb:
                case Drop(seq):
                    stage.pop(seq, None)
                case Trim(seq, length):
                    asked = min(length, stage.get(seq, 0))
                    stage[seq] = asked if self._rng.random() < 0.8 else self._rng.randint(0, asked)
                    kept[seq] = min(stage[seq], kept.get(seq, length))
                case Fork():
                    raise AssertionError("this scheduler forks nothing")

    def _trouble(self, step: Step, stage: dict[SequenceId, int]) -> str:
        wrong = [row.seq for row in step.rows if row.start != stage.get(row.seq, 0)]
        if wrong:
            return f"{wrong} do not continue their cache"
        return "injected" if step.rows and self._rng.random() < 0.02 else ""


@pytest.mark.parametrize("seeds", [range(start, start + 250) for start in range(0, 2000, 250)], ids=str)
def test_every_sequence_ends_once_and_nothing_is_left(seeds: range) -> None:
    for seed in seeds:
        simulate(seed)


def simulate(seed: int) -> None:
    rng = random.Random(seed)
    room = Room(rng.randint(1, 4), kv_tokens=rng.randint(60, 200), context_tokens=60, sequences=rng.choice([1, 3, 256]))
    scheduler = Scheduler(room, budget_tokens=rng.randint(1, 24))
    stages = CheckedStages(rng, room)
    asks = deque(
        SequenceAsk(
            SequenceId(number),
            tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 40))),
            Sampling(seed=number),
            max_tokens=rng.randint(1, 20),
            open_ended=rng.random() < 0.5,
            lane=rng.choice(list(Lane)),
            client=rng.choice("ab"),
            min_tokens=rng.randint(0, 3),
            eos_ids=frozenset({END}),
        )
        for number in range(rng.randint(1, 12))
    )
    ended: dict[SequenceId, str] = {}
    cancelled: set[SequenceId] = set()
    submitted: list[SequenceAsk] = []
    pipeline: deque[Step] = deque()
    for _ in range(STEPS_MAX):
        if asks and rng.random() < 0.3:
            submitted.append(asks.popleft())
            scheduler.submit([submitted[-1]], 0.0)
        if submitted and rng.random() < 0.02:
            victim = rng.choice(submitted).seq
            if victim not in ended:
                cancelled.add(victim)
                scheduler.cancel(victim)
        while (step := scheduler.next_step(0.0)) is not None:
            pipeline.append(step)
        if not pipeline:
            if not asks:
                break
            continue
        for event in scheduler.complete(stages.run(pipeline.popleft()), 0.0):
            assert event.seq not in ended, f"seed {seed}: sequence {event.seq} ended twice"
            assert event.seq not in cancelled, f"seed {seed}: an event of cancelled sequence {event.seq}"
            match event:
                case SequenceEnded(seq, reason):
                    ended[seq] = reason
                case SequenceFailed(seq, reason):
                    assert reason == "injected", f"seed {seed}: sequence {seq} failed for another's trouble: {reason}"
                    ended[seq] = reason
                case TokenDrawn():
                    pass
    missing = {ask.seq for ask in submitted} - ended.keys() - cancelled
    assert not missing, f"seed {seed}: sequences {missing} never ended"
    assert not asks, f"seed {seed}: requests were left over"
    assert not stages.held, f"seed {seed}: the caches of {stages.held} were never freed"
    assert (scheduler.running, scheduler.waiting, scheduler.in_flight, scheduler.reserved_tokens) == (0, 0, 0, 0)
