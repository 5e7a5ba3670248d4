"""coordinator/pacing.py: what it learns from steps, and the chunks that follow."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest

from cluster.limits import STEP_TOKENS_MAX
from cluster.steps import StageMark
from coordinator.pacing import (
    CHUNK_TOKENS_FIRST,
    CHUNK_TOKENS_MIN,
    PACED_TOKENS_MIN,
    SLOWDOWN,
    SLOWDOWN_MIN,
    STEP_S,
    Pace,
)

FIXED, TOKEN = 0.02, 0.0025


def marks(took_s: float) -> tuple[StageMark, ...]:
    """The second stage is the slow one."""
    return StageMark(0, 0.0, 0.0, took_s / 2), StageMark(1, 0.0, 0.0, took_s)


def taught(stages: int = 2, fixed: float = FIXED, token: float = TOKEN) -> Pace:
    """It has seen decode steps of several sizes, and prompts with and without answers beside them."""
    pace = Pace(stages)
    for _ in range(100):
        for rows in (1, 4, 16):
            pace.note(marks(fixed + token * rows), rows, 0, paced=True)
        pace.note(marks(fixed + token * 204), 4, 200, paced=True)
        pace.note(marks(fixed + token * 512), 0, 512, paced=False)
    return pace


def test_it_learns_what_a_row_and_a_prompt_token_cost_on_the_slowest_stage() -> None:
    pace = taught()
    assert pace.alone_s(1) == pytest.approx(FIXED + TOKEN, rel=0.1)
    assert pace.alone_s(16) == pytest.approx(FIXED + 16 * TOKEN, rel=0.1)
    assert pace.token_s == pytest.approx(TOKEN, rel=0.1)


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_beside_answers_a_step_takes_no_longer_than_was_promised(rows: int) -> None:
    pace = taught()
    tokens = pace.beside_answers(rows, rows, [4096], rows)
    took_s = FIXED + TOKEN * (rows + tokens)
    assert 1.9 * pace.alone_s(rows) < took_s <= SLOWDOWN * pace.alone_s(rows)


@pytest.mark.parametrize("deviation", [0.02, 0.08, 0.15])
def test_steps_that_take_longer_than_foreseen_keep_the_promise_too(deviation: float) -> None:
    """Ninety-nine of a hundred, on a machine whose steps scatter like a bell curve with a longer tail."""
    pace, restless, took = taught(), random.Random(1), []
    for _ in range(3000):
        tokens = pace.beside_answers(4, 4, [4096], 4)
        scattered = math.exp(deviation * restless.gauss(0.0, 1.0) * restless.choice((0.8, 0.8, 0.8, 1.4)))
        took.append((FIXED + TOKEN * (4 + tokens)) * scattered)
        pace.note(marks(took[-1]), 4, tokens, paced=True)
    alone_s = FIXED + 4 * TOKEN
    assert sorted(took)[2970] <= SLOWDOWN * alone_s
    assert median(took) > 1.3 * alone_s  # and the prompt goes on


def test_stages_that_take_no_time_are_no_surprise() -> None:
    pace = Pace(1)
    for tokens in (0, 8, 8, 8):
        pace.note(marks(0.0)[1:], 4, tokens, paced=True)
    assert pace.beside_answers(4, 4, [4096], 4) >= PACED_TOKENS_MIN


def test_one_step_that_took_a_hundred_times_as_long_is_soon_forgotten() -> None:
    pace = taught()
    before = pace.slowdown
    pace.note(marks(100 * (FIXED + 20 * TOKEN)), 4, 16, paced=True)
    assert pace.slowdown >= SLOWDOWN_MIN
    for _ in range(150):
        pace.note(marks(FIXED + 20 * TOKEN), 4, 16, paced=True)
    assert pace.slowdown > 0.9 * before


def test_many_short_prompts_go_before_the_few_answers_that_run() -> None:
    pace = taught()
    assert pace.beside_answers(1, 1, [100] * 8, 1) > 5 * pace.beside_answers(1, 1, [4096] * 8, 1)


def test_a_prompt_goes_on_even_where_every_token_costs_more_than_the_step() -> None:
    assert taught(fixed=0.001, token=0.5).beside_answers(1, 1, [100], 1) >= PACED_TOKENS_MIN


def test_chunks_beside_answers_grow_step_by_step() -> None:
    """Where prompt tokens seemed to cost nothing, the next chunk is not a thousand times as large."""
    pace = Pace(1)
    for _ in range(50):
        pace.note(marks(0.01)[1:], 4, 0, paced=True)
    pace.note(marks(0.01)[1:], 4, 8, paced=True)
    assert 8 < pace.beside_answers(4, 4, [4096], 4) <= 13


def test_on_one_stage_a_chunk_takes_as_long_as_a_newcomer_may_wait() -> None:
    assert FIXED + TOKEN * taught(stages=1).alone(10_000) == pytest.approx(STEP_S, rel=0.1)


def test_on_several_stages_chunks_are_such_that_all_work_on_a_prompt_at_once() -> None:
    """Chunks of c on P stages take (n / c + P - 1) steps."""

    def takes_s(chunk: int) -> float:
        return (2048 / chunk + 1) * (FIXED + TOKEN * chunk)

    chosen = taught(stages=2).alone(2048)
    assert takes_s(chosen) <= 1.02 * min(takes_s(chunk) for chunk in range(CHUNK_TOKENS_MIN, 2048))


def test_a_machine_that_takes_long_for_every_step_takes_more_with_it() -> None:
    assert taught(stages=1, fixed=1.0, token=0.01).alone(10_000) == pytest.approx(400, rel=0.1)


def test_a_fast_machine_gets_no_more_than_a_step_may_hold() -> None:
    assert taught(stages=1, fixed=0.001, token=1e-6).alone(100_000) == STEP_TOKENS_MAX


def test_before_anything_was_measured_chunks_are_moderate() -> None:
    assert Pace(1).alone(10_000) == CHUNK_TOKENS_FIRST
    assert Pace(2).alone(800) == 100
    assert 1 <= Pace(2).beside_answers(2, 2, [800], 4) < CHUNK_TOKENS_FIRST


def test_steps_that_carry_no_marks_or_no_rows_teach_nothing() -> None:
    pace = Pace(2)
    pace.note((), 4, 0, paced=True)
    pace.note(marks(1.0), 0, 0, paced=True)
    assert pace.alone_s(4) == 0
