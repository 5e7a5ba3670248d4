"""Thousands of random workloads whose plan breaks under them, some several times: answers go on in the next plan, or
end with an error within the grace. What `test_scheduler_random` asks of every moment holds here as well, and nobody
notices more than a pause: each token comes once, in its place, and is the one that would have come without a break.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from coordinator.admission import Room
from coordinator.deadlines import Limit
from coordinator.parking import BREAKS_MAX
from coordinator.prefix_cache import PrefixCache
from coordinator.promises import Promises
from coordinator.scheduler import Scheduler
from tests.simulation.stages import Costs, Stages
from tests.simulation.test_scheduler_random import arrival
from tests.simulation.world import TICK_S, Break, Life, World

GRACE_S = 1.0
BACK = "no machine came back"


def simulate(seed: int) -> tuple[list[Life], list[Break]]:
    rng = random.Random(seed)
    room = Room(rng.randint(1, 4), kv_tokens=rng.randint(60, 200), context_tokens=60, sequences=rng.choice([1, 3, 256]))
    costs = Costs(rng.uniform(0.001, 0.05), rng.uniform(0.0, 0.01))
    first = machines(rng, room, costs)
    breaks = list(_breaks(rng, room, costs))
    arrivals = [arrival(rng, number, room) for number in range(rng.randint(1, 12))]
    return list(World(*first, arrivals, breaks).run().values()), breaks


def machines(rng: random.Random, room: Room, costs: Costs) -> tuple[Scheduler, Stages]:
    promises = Promises(first_tokens=rng.choice([1, 3, 10, 60]))
    scheduler = Scheduler(
        room,
        budget_tokens=rng.choice([1, 7, 24, 2048]),
        prefixes=PrefixCache(room, enabled=False),
        promises=promises,
    )
    return scheduler, Stages(room, costs, rng, jitter=rng.random())


def _breaks(rng: random.Random, room: Room, costs: Costs) -> Iterator[Break]:
    """One after the other. The plan that takes over may have other stages and another room."""
    at_s = 0.0
    for _ in range(rng.randint(1, 4)):
        at_s += rng.uniform(0.01, 1.5)
        back_s = at_s + rng.choice([0.0, rng.uniform(0, GRACE_S), rng.uniform(0, 2 * GRACE_S)])
        room = replace(room, stages=rng.randint(1, 4), kv_tokens=rng.randint(60, 200))
        yield Break(at_s, back_s, *machines(rng, room, costs), grace_s=GRACE_S)
        at_s = back_s


@pytest.mark.parametrize("seeds", [range(start, start + 500) for start in range(0, 2500, 500)], ids=str)
def test_answers_outlive_their_plans(seeds: range) -> None:
    seen: Counter[str] = Counter()
    broken = 0
    for seed in seeds:
        try:
            lives, breaks = simulate(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        for life in lives:
            _check(life, breaks, f"seed {seed}: {life}")
            seen[life.end] += 1
            broken += life.breaks > 0 and life.end in ("stop", "length")
    assert broken > 200, "hardly an answer went on over a break"
    assert seen[BACK] > 5, "hardly a grace passed"


def _check(life: Life, breaks: list[Break], what: str) -> None:
    allowed = {"stop", "length", "cancelled", "displaced", *Limit}
    too_often = life.breaks >= BREAKS_MAX and "plans in a row broke" in life.end
    unlucky = any(item.back_s - item.at_s >= GRACE_S for item in breaks) and life.end == BACK
    assert life.end in allowed or too_often or unlucky, what
    waited = [item for item in breaks if item.at_s <= life.end_s <= item.back_s + TICK_S]
    assert life.end != BACK or waited, what
