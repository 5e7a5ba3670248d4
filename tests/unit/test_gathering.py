"""How long a coordinator waits between a plan that broke and the next one."""

from __future__ import annotations

import pytest

from coordinator.gathering import RETRY_MAX_S, RETRY_S, STEADY_S, Broken


def _pauses(*served_s: float | None) -> list[float]:
    broken, pauses = Broken(served=False), []
    for seconds in served_s:
        broken = broken.next(seconds)
        pauses.append(broken.pause_s)
    return pauses


@pytest.mark.parametrize("before", [(), (None,), (None,) * 9], ids=["at once", "after one failure", "after many"])
def test_a_plan_that_served_for_a_moment_is_replaced_at_once(before: tuple[None, ...]) -> None:
    assert _pauses(*before, 1.0)[-1] == RETRY_S


def test_plans_that_never_serve_are_made_ever_more_slowly() -> None:
    pauses = _pauses(*(None,) * 9)
    assert pauses[:3] == [2 * RETRY_S, 4 * RETRY_S, 8 * RETRY_S]
    assert pauses[-1] == RETRY_MAX_S


def test_plans_that_serve_for_a_moment_again_and_again_are_not_replaced_at_once_for_ever() -> None:
    assert _pauses(1.0, 1.0, 1.0) == [RETRY_S, 2 * RETRY_S, 4 * RETRY_S]


def test_a_plan_that_served_long_is_replaced_at_once_whatever_was_before() -> None:
    assert _pauses(1.0, 1.0, 1.0, STEADY_S + 1)[-1] == RETRY_S
