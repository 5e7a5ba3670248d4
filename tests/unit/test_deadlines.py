"""Deadlines, as the scheduler keeps them: each limit ends what has passed it, and says which it was."""

from __future__ import annotations

import pytest

from cluster.steps import Drop
from cluster.types import SequenceId
from coordinator.deadlines import Deadlines, Limit
from coordinator.events import SequenceExpired
from tests.unit.test_scheduler import ask, done, scheduler

LIMITS = Deadlines(queue_s=10, first_token_s=20, between_tokens_s=5, total_s=60)


def expired(limit: Limit, seconds: float, *, asked: bool = False) -> list[SequenceExpired]:
    return [SequenceExpired(SequenceId(1), limit, seconds, asked)]


def test_who_waits_too_long_leaves_the_queue() -> None:
    it = scheduler(kv_tokens=10)
    it.submit([ask(0, max_tokens=6)], 100)
    it.submit([ask(1, deadlines=LIMITS)], 100)
    it.next_step(100)
    assert it.expire(109.9) == []
    assert it.expire(110) == expired(Limit.QUEUE, 10)
    assert it.waiting == 0


def test_a_first_token_is_awaited_from_when_it_left_the_queue() -> None:
    it = scheduler()
    it.submit([ask(1, deadlines=LIMITS)], 100)
    it.next_step(105)
    assert it.expire(124.9) == []
    assert it.expire(125) == expired(Limit.FIRST_TOKEN, 20)


def test_each_token_begins_a_new_wait_and_the_cache_is_freed() -> None:
    it = scheduler()
    it.submit([ask(1, deadlines=LIMITS)], 100)
    for now in (119, 123):
        step = it.next_step(now)
        assert step is not None
        it.complete(done(step), now)
    assert it.expire(127.9) == []
    assert it.expire(128) == expired(Limit.BETWEEN_TOKENS, 5)
    step = it.next_step(128)
    assert step is not None
    assert step.verbs == (Drop(SequenceId(1)),)
    assert it.reserved_tokens == 0


def test_the_whole_may_not_take_longer_than_the_request_asked_for() -> None:
    it = scheduler()
    it.submit([ask(1, deadlines=Deadlines().shortened({Limit.TOTAL: 3}))], 100)
    step = it.next_step(100)
    assert step is not None
    it.complete(done(step), 102.9)
    assert it.expire(103) == expired(Limit.TOTAL, 3, asked=True)


@pytest.mark.parametrize("limit", Limit)
def test_a_request_may_shorten_each_limit_for_itself(limit: Limit) -> None:
    shorter = LIMITS.shortened({limit: 2})
    assert shorter.asked == {limit}
    assert [shorter.seconds(each) for each in Limit] == [2 if each is limit else LIMITS.seconds(each) for each in Limit]


@pytest.mark.parametrize("limit", Limit)
def test_but_lengthen_none(limit: Limit) -> None:
    assert LIMITS.shortened({limit: 61}) == LIMITS


@pytest.mark.parametrize(("limit", "wait_s"), [(Limit.FIRST_TOKEN, 7.0), (Limit.BETWEEN_TOKENS, 2.0)])
def test_a_limit_that_the_request_set_is_told_as_its_own(limit: Limit, wait_s: float) -> None:
    it = scheduler()
    it.submit([ask(1, deadlines=LIMITS.shortened({limit: wait_s}))], 100)
    step = it.next_step(100)
    assert step is not None
    if limit is Limit.BETWEEN_TOKENS:
        it.complete(done(step), 100)
    assert it.expire(100 + wait_s - 0.1) == []
    assert it.expire(100 + wait_s) == expired(limit, wait_s, asked=True)
