"""What slow links cost the people behind the scheduler, on a virtual clock: more steps in flight than stages where it
helps, and none where it does not."""

from __future__ import annotations

import random
from collections.abc import Iterable
from statistics import median

import pytest

from coordinator.admission import Room
from coordinator.prefix_cache import PrefixCache
from coordinator.scheduler import Scheduler
from tests.simulation.stages import Costs, Hops, Stages
from tests.simulation.test_scheduler_promises import WARM_UP, asked
from tests.simulation.world import Arrival, Life, World

STAGE = Costs(fixed_s=0.01, token_s=0.00125)
"""Of two stages of a 0.36-billion Llama, one core each."""


def over(hops: Hops, arrivals: Iterable[Arrival], stages: int = 2) -> tuple[dict[int, Life], int]:
    """What became of whom, and the most steps in flight once everybody had a first token (or was alone)."""
    room = Room(stages, 1 << 20, context_tokens=16_384)
    warming = [asked(WARM_UP + number, prompt=100, answer=60) for number in range(4)]
    later = [Arrival(arrival.at_s + 20, arrival.ask) for arrival in arrivals]
    pipeline = Stages(room, STAGE, random.Random(1), hops=hops)
    world = World(Scheduler(room, prefixes=PrefixCache(room, enabled=False)), pipeline, [*warming, *later])
    lives = {int(seq): life for seq, life in world.run().items()}
    answering_s = max(life.tokens_s[0] for life in lives.values() if len(life.tokens) > 1)
    return lives, max(steps for at_s, steps in world.in_flight if at_s > answering_s)


def gap_s(lives: dict[int, Life], users: int) -> float:
    """A user's time per token, once all of them read."""
    return median(gap for number in range(users) for gap in lives[number].gaps_s[50:])


def round_s(users: int, hops_s: float) -> float:
    """The same by hand, with one step for each of two stages."""
    return 2 * (STAGE.fixed_s + STAGE.token_s * users / 2) + hops_s


@pytest.mark.parametrize("users", [32, 64])
def test_slow_hops_are_filled_with_smaller_steps(users: int) -> None:
    lives, steps = over(Hops(delay_s=0.015), [asked(number, prompt=20, answer=200) for number in range(users)])
    assert steps > 2
    assert gap_s(lives, users) <= 0.9 * round_s(users, 3 * 0.015)


@pytest.mark.parametrize(("users", "delay_s"), [(16, 0.0), (16, 0.0005), (2, 0.015)])
def test_nobody_is_parted_where_that_gains_nothing(users: int, delay_s: float) -> None:
    """Hops are short beside a stage's fixed cost, or there are not enough users for another step."""
    lives, steps = over(Hops(delay_s), [asked(number, prompt=20, answer=200) for number in range(users)])
    assert steps == 2
    assert gap_s(lives, users) <= 1.05 * round_s(users, 3 * delay_s)


def test_a_long_prompt_keeps_stages_and_link_busy() -> None:
    """A boundary as wide as the link is slow: its tokens take as long on it as on a stage."""
    prompt, token_s = 12_000, STAGE.token_s
    lives, steps = over(Hops(0.003, token_s), [asked(1, prompt=prompt, answer=1)])
    assert steps > 2
    assert lives[1].first_token_s <= 0.85 * prompt * token_s * 1.5, "a stage waits a third of its time for the link"


def test_a_long_prompt_over_a_fast_link_has_a_chunk_for_each_stage() -> None:
    lives, steps = over(Hops(0.0005, STAGE.token_s / 50), [asked(1, prompt=12_000, answer=1)])
    assert steps == 2
    assert lives[1].first_token_s <= 1.2 * 12_000 * STAGE.token_s
