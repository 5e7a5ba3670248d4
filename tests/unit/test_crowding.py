"""coordinator/crowding.py: who makes room in a full queue; one rule a test, through the scheduler where it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import AtCapacity
from cluster.types import SequenceId
from coordinator.admission import Room
from coordinator.crowding import QueueLimits, displaced
from coordinator.deadlines import Times
from coordinator.events import Event, SequenceDisplaced
from coordinator.lanes import Lane, address_of
from coordinator.prefix_cache import PrefixCache
from coordinator.scheduler import Scheduler
from coordinator.sequence import SequenceAsk, SequenceState
from tests.unit.test_scheduler import NOW, ask

FULL = QueueLimits(requests=4, prompt_tokens=1000)


def crowded(*clients: str, limits: QueueLimits = FULL, **fields: object) -> Scheduler:
    """One runs and fills the caches; requests 0, 1 and so on of these clients wait."""
    room = Room(1, kv_tokens=500, context_tokens=500)
    it = Scheduler(room, prefixes=PrefixCache(room, enabled=False), queue_limits=limits)
    it.submit([ask(900, max_tokens=497, client="running")], NOW)
    assert it.next_step(NOW) is not None
    for number, client in enumerate(clients):
        assert it.submit([ask(number, client=client, **fields)], NOW) == []
    return it


def left(events: list[Event]) -> list[int]:
    assert all(isinstance(event, SequenceDisplaced) for event in events)
    return [event.seq for event in events]


def test_a_newcomer_takes_the_place_of_the_newest_request_of_who_holds_most() -> None:
    it = crowded("many", "few", "many", "many")
    assert left(it.submit([ask(10, client="new")], NOW)) == [3]
    assert it.waiting == 4


def test_who_holds_most_is_turned_away_itself() -> None:
    it = crowded("many", "many", "many", "few")
    with pytest.raises(AtCapacity, match="4 requests"):
        it.submit([ask(10, client="many")], NOW)
    assert it.waiting == 4


def test_nobody_is_displaced_by_who_would_hold_more_than_the_other_has_left() -> None:
    it = crowded("a", "a", "b", "b")
    for client in "ab":
        with pytest.raises(AtCapacity):
            it.submit([ask(10, client=client)], NOW)


def test_a_request_of_several_choices_leaves_as_a_whole() -> None:
    it = crowded("many", "many")
    one = ask(20, client="many")
    it.submit([replace(one, seq=SequenceId(20 + number)) for number in range(2)], NOW)
    assert left(it.submit([ask(10, client="new")], NOW)) == [20, 21]


def test_who_is_refused_in_the_end_displaces_nobody() -> None:
    it = crowded("many", "many", "many", "few")
    with pytest.raises(AtCapacity):
        it.submit([ask(10 + number, client="new") for number in range(3)], NOW)
    assert it.waiting == 4


def test_prompt_tokens_are_shared_as_places_are() -> None:
    it = crowded("long", "long", "short", limits=QueueLimits(100, 600), prompt=200)
    assert left(it.submit([ask(10, client="new", prompt=100)], NOW)) == [1]


def test_lanes_make_no_room_for_each_other() -> None:
    it = crowded("many", "many", "many", "many")
    assert it.submit([ask(10, client="new", lane=Lane.BATCH)], NOW) == []
    assert it.waiting == 5


def test_a_request_that_has_begun_keeps_its_place() -> None:
    """One of its choices has had room, so its client may have read some of it."""

    def waiting(number: int, request: int, admitted_s: float | None = None) -> SequenceState:
        return SequenceState(ask(number, client="many"), number, request, Times(NOW, admitted_s))

    new = [ask(10, client="new")]
    limits = QueueLimits(requests=2)
    assert displaced({"many": [waiting(0, 0), waiting(1, 1, NOW)]}, new, limits) is None
    assert displaced({"many": [waiting(1, 0), waiting(2, 0)]}, new, limits) is None
    assert displaced({"many": [waiting(0, 0, NOW), waiting(1, 1)]}, new, limits) is not None


def test_keys_that_one_address_makes_up_keep_no_other_address_out() -> None:
    it = crowded("far 1", "far 2", "far 3", "far 4")
    with pytest.raises(AtCapacity):
        it.submit([ask(10, client="far 5")], NOW)
    assert left(it.submit([ask(11, client="near")], NOW)) == [3]
    assert left(it.submit([ask(12, client="near 1")], NOW)) == [2]
    with pytest.raises(AtCapacity):
        it.submit([ask(13, client="near 2")], NOW)


def test_the_clients_of_one_address_share_what_it_holds() -> None:
    it = crowded("proxy many", "proxy many", "proxy few", "other")
    assert left(it.submit([ask(10, client="proxy new")], NOW)) == [1]


def test_an_empty_lane_takes_one_request_however_large() -> None:
    it = crowded(limits=QueueLimits(2, 600))
    assert it.submit([ask(number, prompt=300) for number in range(3)], NOW) == []
    with pytest.raises(AtCapacity):
        it.submit([ask(10, client="new", prompt=1)], NOW)
    assert it.waiting == 3


CLIENTS = ("a 1", "a 2", "b", "c")

SOMEBODY = st.tuples(st.sampled_from(CLIENTS), st.integers(1, 40), st.integers(1, 3))
"""A client, its request's prompt tokens, and choices. No request is more than the queue below holds."""


@given(st.lists(SOMEBODY, max_size=40))
def test_the_queue_stays_within_its_limits_and_nobody_is_kept_out_by_who_holds_more(
    requests: list[tuple[str, int, int]],
) -> None:
    limits = QueueLimits(requests=8, prompt_tokens=150)
    waiting: dict[str, list[SequenceState]] = {client: [] for client in CLIENTS}

    def held(address: str) -> list[SequenceState]:
        return [state for client in CLIENTS if address_of(client) == address for state in waiting[client]]

    def share(states: Sequence[SequenceState], *more: SequenceAsk) -> float:
        return limits.share([*(state.ask for state in states), *more])

    for number, (client, prompt, choices) in enumerate(requests):
        one = ask(0, prompt=prompt, client=client)
        asks = [replace(one, seq=SequenceId(10 * number + choice)) for choice in range(choices)]
        everybody = [state for states in waiting.values() for state in states]
        mine = share(held(address_of(client)), *asks)
        leaving = displaced(waiting, asks, limits)
        if leaving is None:
            assert not limits.hold([*(state.ask for state in everybody), *asks])
            for other in set(CLIENTS) - {client}:
                alone = len(waiting[other]) == len(held(address_of(other))) > 0
                if alone and address_of(other) != address_of(client):
                    request = [state for state in waiting[other] if state.request == waiting[other][-1].request]
                    rest = [state for state in held(address_of(other)) if state not in request]
                    enough = limits.hold([*(state.ask for state in everybody if state not in request), *asks])
                    assert not enough or share(rest) < mine
            continue
        for other in CLIENTS:
            waiting[other] = [state for state in waiting[other] if state not in leaving]
        for address in {address_of(state.ask.client) for state in leaving} - {address_of(client)}:
            assert share(held(address)) >= share(held(address_of(client)), *asks)
        waiting[client] += [
            SequenceState(each, 10 * number + choice, 10 * number, Times(NOW)) for choice, each in enumerate(asks)
        ]
        assert limits.hold([state.ask for states in waiting.values() for state in states])
