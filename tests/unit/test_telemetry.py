"""Where steps' time went, as the coordinator counts it."""

from __future__ import annotations

import pytest

from cluster.steps import StageMark, StepDone
from cluster.types import StepId
from coordinator.pipeline import TimedOutcome
from coordinator.telemetry import Telemetry


def step(elapsed_s: float) -> TimedOutcome:
    """Two stages compute for 10 and 20 ms of it."""
    marks = (StageMark(0, 0.0, 0.0, 0.01), StageMark(1, 0.0, 0.0, 0.02))
    return TimedOutcome(StepDone(StepId(0), (), (), marks), elapsed_s, 1, 1)


def test_hops_are_what_no_stage_accounts_for_in_steps_without_prompts() -> None:
    telemetry = Telemetry()
    telemetry.note(step(5.0), drawn=1, decode_only=False)
    for elapsed_s in (0.032, 0.034):
        telemetry.note(step(elapsed_s), drawn=1, decode_only=True)
    assert (telemetry.steps, telemetry.decode_steps) == (3, 2)
    assert telemetry.decode_hops_s == pytest.approx(0.006)
    assert telemetry.stages_busy_s == pytest.approx((0.03, 0.06))
    times = telemetry.token_time()
    assert times is not None and times.hops_s == pytest.approx(0.003)
