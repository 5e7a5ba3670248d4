"""coordinator/spreading.py: how many steps are in flight, from what steps took in stages and on links."""

from __future__ import annotations

from cluster.steps import StageMark, StepDone
from cluster.types import StepId
from coordinator.pacing import Pace
from coordinator.pipeline import TimedOutcome
from coordinator.spreading import AWAY_S_MIN, STEPS_PER_STAGE_MAX, Spread

FIXED, ROW = 0.01, 0.001


def taught(away_s: float, stages: int = 2) -> Spread:
    """It has seen decode steps of several sizes."""
    pace = Pace(stages)
    spread = Spread(stages, pace)
    for _ in range(200):
        for rows in (1, 4, 16):
            marks = tuple(StageMark(index, 0.0, 0.0, FIXED + ROW * rows) for index in range(stages))
            pace.note(marks, rows, 0, paced=True)
            spread.note(marks, away_s, rows, 0)
    return spread


def test_there_is_a_step_for_each_stage_while_nothing_is_known() -> None:
    assert Spread(3, Pace(3)).steps(64) == 3
    assert Spread(3, Pace(3)).steps(0) == 3
    assert [Spread(stages, Pace(stages)).steps(0) for stages in (19, 20, 64)] == [19, 20, 64]


def test_hops_of_a_quick_network_part_nobody() -> None:
    assert taught(0.9 * AWAY_S_MIN).steps(64) == 2


def test_slow_hops_are_filled_but_a_step_is_never_without_rows() -> None:
    assert 2 < taught(0.05).steps(64) <= 2 * STEPS_PER_STAGE_MAX
    assert taught(0.2).steps(64) == 2 * STEPS_PER_STAGE_MAX
    assert taught(0.2).steps(3) <= 3
    assert taught(0.2).steps(1) == 2


def test_the_coordinators_own_work_is_not_time_on_a_link() -> None:
    marks = (StageMark(0, receive_s=0.004, queue_s=0.001, compute_s=0.01),)
    timed = TimedOutcome(StepDone(StepId(1), (), (), marks), elapsed_s=0.03, rows=1, tokens=1, worked_s=0.012)
    assert round(timed.away_s, 6) == 0.007, "what was spent on receiving counts"
