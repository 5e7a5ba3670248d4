"""Thousands of random workloads whose prompts begin alike, through the scheduler and stages that hold real tokens.

A stage's answer is a function of every token that it has cached. Whatever is shared, whoever fails, is cancelled or
thrown out: each answer is the one that a computation without any sharing gives, no stage ever holds more than was
promised, what is told to be cached was not computed, and in the end stages hold what is retained and nothing else.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from functools import cache

import pytest

from cluster.rewinding import EXACT, Rewind, WaysBack
from cluster.steps import Drawn, Drop, Fork, Honoured, Move, Sampling, Step, StepDone, StepFailed, StepOutcome, Trim
from cluster.types import SequenceId
from coordinator.admission import Room
from coordinator.events import PrefixCached, SequenceEnded, SequenceFailed, TokenDrawn
from coordinator.lanes import Lane
from coordinator.prefix_cache import PrefixCache
from coordinator.promises import Promises
from coordinator.scheduler import Scheduler
from coordinator.sequence import SequenceAsk

END, VOCABULARY = 0, 6
CONTEXT = 60
STEPS_MAX = 20_000
RULES = [EXACT, EXACT, Rewind(window=4), Rewind(every=8), Rewind(window=4, every=8)]

Tokens = tuple[int, ...]


@cache
def drawn(tokens: Tokens) -> int:
    """What follows these tokens."""
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def answer(ask: SequenceAsk) -> Tokens:
    """Computed alone, at once."""
    tokens = ask.prompt
    while len(tokens) < ask.worst_case_tokens:
        tokens += (drawn(tokens),)
        if tokens[-1] in ask.eos_ids:
            break
    return tokens[len(ask.prompt) :]


@dataclass(slots=True)
class Cached:
    tokens: list[int]
    ways: WaysBack[bool]

    def cut(self, length: int) -> None:
        del self.tokens[length:]
        self.ways.cut(length)


@dataclass(slots=True)
class Stages:
    """One after another. Steps fail and cuts keep less than they must, as often as asked for."""

    rng: random.Random
    room: Room
    trouble: float
    computed: Counter[SequenceId] = field(default_factory=Counter)  # positions on the first stage
    stages: list[dict[SequenceId, Cached]] = field(init=False)

    def __post_init__(self) -> None:
        self.stages = [{} for _ in range(self.room.stages)]

    def run(self, step: Step) -> StepOutcome:
        kept: dict[SequenceId, int] = {}
        failure: StepFailed | None = None
        for index, stage in enumerate(self.stages):
            for verb in step.verbs:
                match verb:
                    case Drop(seq):
                        stage.pop(seq, None)
                    case Trim(seq, length):
                        self._keep(stage, seq, stage.pop(seq, None), length, kept)
                    case Move(src, dst, length):
                        self._keep(stage, dst, stage.pop(src, None), length, kept)
                    case Fork(src, dst, length):
                        source = stage.get(src)
                        twin = source and Cached(list(source.tokens), source.ways.forked(len(source.tokens)))
                        self._keep(stage, dst, twin, length, kept)
            self._check_memory(stage)
            wrong = [row.seq for row in step.rows if row.start != self._length(stage, row.seq)]
            if failure is None and (wrong or (step.rows and self.rng.random() < self.trouble)):
                blamed = (step.rows[0].seq,) if len(step.rows) == 1 else ()
                failure = StepFailed(step.id, index, f"{wrong} do not go on" if wrong else "injected", blamed)
            if failure is None:
                self._compute(step, stage, is_first=index == 0)
        honoured = tuple(Honoured(seq, length) for seq, length in kept.items())
        if failure is not None:
            return replace(failure, honoured=honoured)
        last = self.stages[-1]
        found = tuple(Drawn(row.seq, row.end, drawn(tuple(last[row.seq].tokens))) for row in step.rows if row.draw)
        return StepDone(step.id, found, honoured, ())

    def _keep(
        self,
        stage: dict[SequenceId, Cached],
        seq: SequenceId,
        cached: Cached | None,
        asked: int,
        kept: dict[SequenceId, int],
    ) -> None:
        assert seq not in stage, "a sequence is begun twice"
        length = 0
        if cached is not None:
            length = cached.ways.honoured(len(cached.tokens), asked)
            if self.rng.random() < self.trouble:
                length = cached.ways.honoured(len(cached.tokens), self.rng.randint(0, length))
            cached.cut(length)
        if cached is not None and length > 0:
            stage[seq] = cached
        kept[seq] = min(length, kept.get(seq, length))

    def _compute(self, step: Step, stage: dict[SequenceId, Cached], *, is_first: bool) -> None:
        for row in step.rows:
            cached = stage.setdefault(row.seq, Cached([], WaysBack(self.room.rewind)))
            cached.tokens += row.tokens
            cached.ways.grew(row.end, True if cached.ways.wants_snapshot(row.start, row.end) else None)
            if is_first:
                self.computed[row.seq] += len(row.tokens)
        self._check_memory(stage)

    def _check_memory(self, stage: dict[SequenceId, Cached]) -> None:
        assert sum(len(cached.tokens) for cached in stage.values()) <= self.room.kv_tokens, "more than was promised"
        assert len(stage) <= self.room.sequences, "more sequences than were promised"

    def _length(self, stage: dict[SequenceId, Cached], seq: SequenceId) -> int:
        return len(stage[seq].tokens) if seq in stage else 0


@dataclass(slots=True)
class Seen:
    """What came of a workload."""

    told: dict[SequenceId, int] = field(default_factory=dict)
    computed: int = 0


def simulate(seed: int, *, trouble: float, enabled: bool = True) -> Seen:
    rng = random.Random(seed)
    room = Room(rng.randint(1, 4), rng.randint(60, 300), CONTEXT, rng.choice([2, 4, 256]), rng.choice(RULES))
    prefixes = PrefixCache(
        room, enabled=enabled, shared_tokens_min=rng.randint(1, 6), awaited_tokens_min=rng.randint(1, 9)
    )
    promises = Promises(first_tokens=rng.choice([1, 3, 10, 60]))
    scheduler = Scheduler(room, budget_tokens=rng.randint(1, 24), prefixes=prefixes, promises=promises)
    stages = Stages(random.Random(seed), room, trouble)
    known: list[Tokens] = [()]  # conversations that further prompts go on from, even where they have not ended yet
    asks: dict[SequenceId, SequenceAsk] = {}
    drawn_of: dict[SequenceId, Tokens] = {}
    ended: dict[SequenceId, str] = {}
    cancelled: set[SequenceId] = set()
    seen = Seen()
    pipeline: deque[Step] = deque()
    left = rng.randint(1, 14)
    for _ in range(STEPS_MAX):
        if left and rng.random() < 0.3:
            request = _request(random.Random(seed * 1000 + left), len(asks), known, careful=trouble == 0)
            known += [ask.prompt + answer(ask) for ask in request]
            left -= 1
            asks |= {ask.seq: ask for ask in request}
            scheduler.submit(request, 0.0)
        if asks and trouble and rng.random() < 0.03:
            victim = rng.choice(list(asks))
            if victim not in ended:
                cancelled.add(victim)
                scheduler.cancel(victim)
        while (step := scheduler.next_step(0.0)) is not None:
            pipeline.append(step)
        if not pipeline:
            if not left:
                break
            continue
        for event in scheduler.complete(stages.run(pipeline.popleft()), 0.0):
            seq = event.seq
            assert seq not in ended and seq not in cancelled, f"seed {seed}: an event after the end of {seq}"
            match event:
                case PrefixCached(_, tokens):
                    assert seq not in drawn_of, f"seed {seed}: told after the first token"
                    assert 0 < tokens < len(asks[seq].prompt)
                    seen.told[seq] = tokens
                case TokenDrawn(_, token):
                    drawn_of[seq] = (*drawn_of.get(seq, ()), token)
                case SequenceEnded(_, reason):
                    ended[seq] = reason
                    assert drawn_of[seq] == answer(asks[seq]), f"seed {seed}: {seq} was told another's answer"
                case SequenceFailed(_, reason):
                    assert reason == "injected", f"seed {seed}: {seq} failed for another's trouble: {reason}"
                    ended[seq] = reason
    assert asks.keys() == ended.keys() | cancelled, f"seed {seed}: some never ended"
    assert (scheduler.running, scheduler.waiting, scheduler.in_flight, scheduler.reserved_tokens) == (0, 0, 0, 0)
    status = scheduler.prefixes
    for stage in stages.stages:
        # Of a cancelled prompt whose last rows failed there may be less than is accounted for, never more.
        assert set(stage) <= set(prefixes.retained), f"seed {seed}: {set(stage)} were never freed"
        held = sum(len(cached.tokens) for cached in stage.values())
        assert held <= status.retained_tokens if trouble else held == status.retained_tokens
    if not trouble:
        for seq, ask in asks.items():
            expected = len(ask.prompt) - seen.told.get(seq, 0) + len(drawn_of[seq]) - 1
            assert stages.computed[seq] == expected, f"seed {seed}: {seq} was told something else than was computed"
        assert status.cached_tokens == sum(seen.told.values())
    seen.computed = stages.computed.total()
    return seen


def _request(rng: random.Random, number: int, known: list[Tokens], *, careful: bool) -> list[SequenceAsk]:
    """A prompt that goes on from some conversation, or from a part of it; one choice or several. A careful client says
    how long the answer may be, and so is never thrown out."""
    past = rng.choice(known)[: CONTEXT - 12]
    if rng.random() < 0.4:
        past = past[: rng.randint(0, len(past))]
    prompt = (*past, *(rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 10))))
    lane = Lane.INTERACTIVE if careful else rng.choice(list(Lane))
    open_ended, max_tokens, salt = (
        not careful and rng.random() < 0.5,
        rng.randint(1, CONTEXT - len(prompt)),
        rng.choice("xxy"),
    )
    return [
        SequenceAsk(
            SequenceId(number + own),
            prompt,
            Sampling(seed=1, choice=own),
            max_tokens=max_tokens,
            eos_ids=frozenset({END}),
            salt=salt,
            open_ended=open_ended,
            lane=lane,
            client=rng.choice("ab"),
        )
        for own in range(rng.choice([1, 1, 1, 3]))
    ]


@pytest.mark.parametrize("seeds", [range(start, start + 150) for start in range(0, 1200, 150)], ids=str)
@pytest.mark.parametrize("trouble", [0.0, 0.03])
def test_answers_are_those_of_a_computation_that_shares_nothing(seeds: range, trouble: float) -> None:
    for seed in seeds:
        simulate(seed, trouble=trouble)


def test_sharing_saves_work_and_never_costs_any() -> None:
    """In these workloads a quarter and more of all positions."""
    shared = [simulate(seed, trouble=0.0).computed for seed in range(300)]
    alone = [simulate(seed, trouble=0.0, enabled=False).computed for seed in range(300)]
    assert all(less <= more for less, more in zip(shared, alone, strict=True))
    assert sum(shared) < 3 / 4 * sum(alone)
