"""Who sends how much, from answers that come now and then."""

from __future__ import annotations

from coordinator.holders import Held


def test_what_was_sent_between_two_answers_is_the_rate() -> None:
    assert Held(10, 1000, 0.0, 5.0).then(20, 1600, 7.0) == Held(20, 1600, 300.0, 7.0)


def test_a_node_that_started_anew_sends_nothing_backwards() -> None:
    assert Held(10, 1000, 300.0, 5.0).then(10, 40, 7.0) == Held(10, 40, 0.0, 7.0)
