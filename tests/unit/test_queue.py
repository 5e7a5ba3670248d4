"""When who was turned away should come back, whose turn it is, and what a client is charged for; through the
scheduler."""

from __future__ import annotations

from collections import Counter

import pytest

from cluster.errors import AtCapacity
from cluster.limits import QUEUED_REQUESTS_MAX, RETRY_AFTER_MAX_S
from coordinator.admission import Room
from coordinator.crowding import QueueLimits
from coordinator.lanes import Lane
from coordinator.queue import RATE_WINDOW_S, RETRY_UNKNOWN_S
from coordinator.scheduler import Scheduler
from tests.unit.test_admission import turn
from tests.unit.test_scheduler import END, NOW, ask, done, scheduler, step_of


def refusal(it: Scheduler, count: int, now: float) -> float:
    """In how many seconds so many requests should come back."""
    with pytest.raises(AtCapacity) as caught:
        it.submit([ask(900 + number) for number in range(count)], now)
    return caught.value.retry_after_s


def full(it: Scheduler) -> Scheduler:
    """One runs, and as many wait as may."""
    it.submit([ask(0)], NOW)
    turn(it)
    it.submit([ask(1 + number) for number in range(QUEUED_REQUESTS_MAX)], NOW)
    return it


def test_however_long_the_queue_takes_who_is_turned_away_comes_back() -> None:
    it = full(scheduler(kv_tokens=7, budget=64))
    assert refusal(it, 10, NOW + RATE_WINDOW_S - 1) == RETRY_AFTER_MAX_S


def test_what_left_the_queue_long_ago_says_nothing_of_its_pace() -> None:
    it = full(scheduler(kv_tokens=7, budget=64))
    assert refusal(it, 1, NOW + RATE_WINDOW_S + 1) == RETRY_UNKNOWN_S


def test_a_queue_full_of_prompt_tokens_has_room_at_the_rate_at_which_they_leave() -> None:
    """A prompt of three tokens leaves every three seconds, and two tokens are too many."""
    it = Scheduler(Room(1, 7, 500), budget_tokens=64, queue_limits=QueueLimits(requests=100, prompt_tokens=10))
    for number in range(4):
        it.submit([ask(number)], NOW)
        turn(it, END, now=NOW + 3 * number)
    it.submit([ask(10 + number) for number in range(3)], NOW + 12)
    assert refusal(it, 1, NOW + 12) == pytest.approx(2, rel=0.3)


def test_a_client_is_charged_for_what_it_used_not_for_what_it_named() -> None:
    it = scheduler(kv_tokens=500, budget=64)
    it.submit([ask(0, max_tokens=400, client="modest")], NOW)
    turn(it, END)
    it.submit([ask(1, max_tokens=40, client="other")], NOW)
    while it.running or it.waiting:
        turn(it)
    it.submit([ask(2, max_tokens=400, client="other")], NOW)
    it.submit([ask(3, max_tokens=400, client="modest")], NOW)
    assert [row.seq for row in step_of(it).rows] == [3]


def test_who_made_room_for_a_person_comes_back_before_its_clients_others() -> None:
    it = scheduler(kv_tokens=14, budget=64)
    for number, answer in enumerate((4, 4, 8)):  # the last one has no room beside the second
        it.submit([ask(number, max_tokens=answer, lane=Lane.BATCH)], NOW)
    assert turn(it) == [0, 1]
    it.submit([ask(10)], NOW)
    order: list[int] = []
    while it.running or it.waiting:
        order += [seq for seq in turn(it, END) if seq not in order]
    assert order == [0, 10, 1, 2]


def test_the_prompts_of_clients_are_computed_in_turns() -> None:
    it = scheduler(kv_tokens=5000, budget=10)
    for number in range(3):
        it.submit([ask(number, prompt=100, client="many")], NOW)
    it.submit([ask(9, prompt=100, client="few")], NOW)
    tokens: Counter[int] = Counter()
    for _ in range(18):
        step = step_of(it)
        tokens.update({row.seq: len(row.tokens) for row in step.rows})
        it.complete(done(step), NOW)
    assert tokens[9] >= 80


@pytest.mark.parametrize("lane", Lane)
def test_a_prompt_goes_slowly_only_where_people_read_along(lane: Lane) -> None:
    it = scheduler(kv_tokens=5000, context=3000, budget=2048)
    it.submit([ask(0, max_tokens=100, lane=lane)], NOW)
    turn(it)
    it.submit([ask(1, prompt=2000)], NOW)
    chunk = next(row for row in step_of(it).rows if row.seq == 1)
    assert (len(chunk.tokens) < 100) == (lane is Lane.INTERACTIVE)
