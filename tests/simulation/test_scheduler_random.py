"""Thousands of random workloads through the scheduler and a pipeline that checks every row.

Requests come and go, in both lanes and from several clients, with and without a length; clients cancel, steps fail
with and without blame, trims keep less than asked, deadlines pass, room runs out. Whatever happens: every sequence ends
exactly once, and with the tokens that it would have drawn alone; no row starts anywhere but at its cache's end, the
caches never hold more than was promised, and nothing is left whenever all is idle.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.steps import Sampling
from cluster.types import SequenceId
from coordinator.admission import Room
from coordinator.crowding import QueueLimits
from coordinator.deadlines import Deadlines, Limit
from coordinator.lanes import Lane
from coordinator.prefix_cache import PrefixCache
from coordinator.promises import Promises
from coordinator.scheduler import Scheduler
from coordinator.sequence import SequenceAsk
from tests.simulation.stages import END, Costs, Stages
from tests.simulation.world import Arrival, Life, World

ENDS = {"stop", "length", "cancelled", "injected", "turned away", "displaced", *Limit}


def simulate(seed: int) -> list[Life]:
    """A workload and a machine drawn from a seed."""
    rng = random.Random(seed)
    room = Room(rng.randint(1, 4), kv_tokens=rng.randint(60, 200), context_tokens=60, sequences=rng.choice([1, 3, 256]))
    costs = Costs(rng.uniform(0.001, 0.05), rng.uniform(0.0, 0.01))
    is_troubled = rng.random() < 0.5
    stages = Stages(room, costs, rng, failing=0.04 * is_troubled, forgetful=0.2 * is_troubled, jitter=rng.random())
    scheduler = Scheduler(
        room,
        budget_tokens=rng.choice([1, 7, 24, 2048]),
        prefixes=PrefixCache(room, enabled=False),
        promises=Promises(first_tokens=rng.choice([1, 3, 10, 60])),
        queue_limits=rng.choice([QueueLimits(), QueueLimits(2, 60), QueueLimits(5, 100)]),
    )
    world = World(scheduler, stages, [arrival(rng, number, room) for number in range(rng.randint(1, 12))])
    return list(world.run().values())


def arrival(rng: random.Random, number: int, room: Room) -> Arrival:
    prompt = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 40)))
    is_open = rng.random() < 0.5
    ask = SequenceAsk(
        SequenceId(number),
        prompt,
        Sampling(seed=rng.randint(0, 99)),
        max_tokens=min(room.context_tokens, room.kv_tokens) - len(prompt) if is_open else rng.randint(1, 20),
        min_tokens=rng.randint(0, 3),
        eos_ids=frozenset({END}) if rng.random() < 0.8 else frozenset(),
        open_ended=is_open,
        lane=rng.choice(list(Lane)),
        client=rng.choice("ab"),
        deadlines=_deadlines(rng) if rng.random() < 0.2 else Deadlines(),
    )
    at_s = rng.choice([0.0, rng.uniform(0, 2)])
    return Arrival(at_s, ask, at_s + rng.uniform(0, 1) if rng.random() < 0.1 else None)


def _deadlines(rng: random.Random) -> Deadlines:
    return Deadlines(rng.uniform(0.2, 3), rng.uniform(0.2, 3), rng.uniform(0.02, 0.5), rng.uniform(0.5, 5))


@pytest.mark.parametrize("seeds", [range(start, start + 500) for start in range(0, 4000, 500)], ids=str)
def test_every_request_ends_once_as_it_would_alone_and_nothing_is_left(seeds: range) -> None:
    seen: Counter[str] = Counter()
    thrown_out = 0
    for seed in seeds:
        try:
            lives = simulate(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        assert {life.end for life in lives} <= ENDS, f"seed {seed}"
        seen.update(life.end for life in lives)
        thrown_out += sum(life.drops > 0 and life.end in ("stop", "length") for life in lives)
    # The workloads reach what they are about.
    assert seen.keys() >= {"stop", "length", "cancelled", "injected", "turned away", "displaced", *(Limit)}
    assert thrown_out > 20


@given(
    stages=st.integers(1, 4),
    kv_tokens=st.integers(30, 90),
    promised=st.integers(1, 30),
    requests=st.lists(
        st.tuples(st.integers(1, 20), st.booleans(), st.sampled_from(Lane), st.sampled_from("abc"), st.integers(0, 20)),
        min_size=1,
        max_size=8,
    ),
)
@settings(max_examples=300, deadline=None)
def test_whatever_is_asked_comes_to_its_end(
    stages: int, kv_tokens: int, promised: int, requests: list[tuple[int, bool, Lane, str, int]]
) -> None:
    """Nothing fails here and nobody leaves, so all end with their whole answer. Failures come out small."""
    room = Room(stages, kv_tokens, context_tokens=30)
    arrivals = [
        Arrival(
            at / 20,
            SequenceAsk(
                SequenceId(number),
                (1,) * prompt,
                Sampling(seed=number),
                30 - prompt if is_open else 10,
                open_ended=is_open,
                lane=lane,
                client=client,
            ),
        )
        for number, (prompt, is_open, lane, client, at) in enumerate(requests)
    ]
    scheduler = Scheduler(room, prefixes=PrefixCache(room, enabled=False), promises=Promises(first_tokens=promised))
    world = World(scheduler, Stages(room, Costs(), random.Random(0)), arrivals)
    assert {life.end for life in world.run().values()} == {"length"}
