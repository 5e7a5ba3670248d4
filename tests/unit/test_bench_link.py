"""The emulated link of `make bench`: when a frame leaves, given when frames came."""

from __future__ import annotations

import pytest

from tests.bench.link import WIFI, Direction, Link
from tests.bench.trip import floor_s

FRAME = bytes(1000)


def test_a_frame_takes_its_bytes_and_the_delay() -> None:
    way = Direction(Link("", bytes_s=10_000, delay_s=0.5), seed=0)
    way.take(FRAME, 2.0)
    assert way.due_s == pytest.approx(2.6)
    assert list(way.due(2.59)) == []
    assert list(way.due(2.61)) == [FRAME]
    assert way.due_s is None


def test_frames_that_come_at_once_share_the_bandwidth() -> None:
    way = Direction(Link("", bytes_s=10_000, delay_s=0.5), seed=0)
    for _ in range(3):
        way.take(FRAME, 0.0)
    assert len(list(way.due(0.65))) == 1
    assert len(list(way.due(0.85))) == 2


def test_a_late_frame_holds_up_those_behind_it_and_the_share_is_as_asked() -> None:
    way = Direction(Link("", bytes_s=1e9, delay_s=0.0, late_share=0.05, late_s=0.08), seed=0)
    waits, lasts = [], [0.0]
    for index in range(4000):
        came_s = index * 0.2  # far apart, so that each is late by itself
        way.take(FRAME, came_s)
        assert way.due_s is not None
        waits.append(way.due_s - came_s)
        list(way.due(way.due_s))
    assert sum(wait > 0.05 for wait in waits) / len(waits) == pytest.approx(0.05, abs=0.01)
    crowd = Direction(Link("", bytes_s=1e9, delay_s=0.0, late_share=0.05, late_s=0.08), seed=0)
    for index in range(200):
        crowd.take(FRAME, index * 0.001)
        lasts.append(crowd._last_s)
    assert lasts == sorted(lasts)
    assert max(last - 0.001 * index for index, last in enumerate(lasts)) > 0.05


def test_one_frame_of_every_twenty_is_late_whichever() -> None:
    way = Direction(WIFI, seed=0)
    waits = []
    for index in range(400):
        way.take(FRAME, float(index))
        waits.append(way.emptied_s() - index)
    twenties = [waits[at : at + 20] for at in range(0, 400, 20)]
    assert [sum(wait > 0.05 for wait in twenty) for twenty in twenties] == [1] * 20
    assert len({twenty.index(max(twenty)) for twenty in twenties}) > 5


def test_a_token_takes_two_ways_and_waits_for_late_frames_of_four() -> None:
    calm = Link("", bytes_s=1e6, delay_s=0.01)
    carried_s = (66 + 1000 + 66 + 128) / 1e6
    assert floor_s(calm, 1000, (0.5, 0.5)) == pytest.approx(2 * 0.01 + carried_s)
    # Long passes: an acknowledgement is through before the message after it, however late, so two frames count.
    assert floor_s(WIFI, 1000, (1.0, 1.0)) == pytest.approx(2 * (0.003 + 0.05 * 0.08), rel=0.02)
    # No passes: one that is late holds up the message behind it, so all four count.
    assert floor_s(WIFI, 1000, (0.0, 0.0)) > 2 * (0.003 + 0.09 * 0.08)
