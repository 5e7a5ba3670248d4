"""coordinator/parking.py: who waits between two plans, for how long, and what they are told."""

from __future__ import annotations

import pytest

from cluster.errors import AtCapacity, RequestError
from cluster.steps import Sampling
from cluster.types import SequenceId
from coordinator.admission import Room
from coordinator.crowding import QueueLimits
from coordinator.deadlines import Deadlines, Limit
from coordinator.events import Event, SequenceExpired, SequenceFailed
from coordinator.parking import BREAKS_MAX, Parking, Stranded
from coordinator.scheduler import Scheduler
from coordinator.sequence import SequenceAsk, SequenceState

CONTEXT, GRACE_S = 100, 60.0


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def ask(
    number: int, *, max_tokens: int = 8, open_ended: bool = False, deadlines: Deadlines | None = None
) -> SequenceAsk:
    return SequenceAsk(
        SequenceId(number),
        (1,) * 4,
        Sampling(seed=number),
        max_tokens,
        open_ended=open_ended,
        deadlines=deadlines or Deadlines(),
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stranded(clock: Clock, asks: list[SequenceAsk], heard: list[Event]) -> list[Stranded]:
    """What a plan leaves that has computed two tokens of the first one."""
    scheduler = Scheduler(Room(1, 10 * CONTEXT, CONTEXT))
    scheduler.submit(asks, clock())
    states = scheduler.strand()
    for _ in range(2):
        states[0].accept(5, clock())
    return [Stranded(state, heard.append) for state in states]


def test_those_of_the_plan_leave_in_their_order_and_before_those_who_came_later(clock: Clock) -> None:
    parking, heard = Parking(CONTEXT, GRACE_S, clock), list[Event]()
    parking.take(stranded(clock, [ask(3), ask(1)], heard))
    parking.submit([ask(2)], heard.append)
    assert [one.state.ask.seq for one in parking.leave()] == [3, 1, 2]
    assert len(parking) == 0 and not heard


def test_the_grace_ends_it_for_everybody(clock: Clock) -> None:
    parking, heard = Parking(CONTEXT, GRACE_S, clock), list[Event]()
    parking.take(stranded(clock, [ask(1)], heard))
    parking.submit([ask(2)], heard.append)
    clock.now_s += GRACE_S - 0.1
    assert not parking.is_over
    clock.now_s += 0.2
    assert parking.is_over
    parking.end("nobody is there")
    assert heard == [SequenceFailed(SequenceId(seq), "nobody is there", unserved=True) for seq in (1, 2)]
    assert len(parking) == 0


def test_a_wait_counts_for_the_whole_request_and_the_queue_and_not_for_stages(clock: Clock) -> None:
    limits = Deadlines(queue_s=20.0, first_token_s=1.0, between_tokens_s=1.0, total_s=30.0)
    parking, heard = Parking(CONTEXT, GRACE_S, clock), list[Event]()
    parking.take(stranded(clock, [ask(1, deadlines=limits)], heard))
    parking.submit([ask(2, deadlines=limits)], heard.append)
    clock.now_s += 19.0
    parking.expire()
    assert not heard
    clock.now_s += 2.0
    parking.expire()
    assert heard == [SequenceExpired(SequenceId(2), Limit.QUEUE, 20.0, asked=False)]
    clock.now_s += 10.0
    parking.expire()
    assert heard[1:] == [SequenceExpired(SequenceId(1), Limit.TOTAL, 30.0, asked=False)]


def test_what_a_request_names_itself_counts_also_while_nobody_computes(clock: Clock) -> None:
    impatient = Deadlines().shortened({Limit.BETWEEN_TOKENS: 2.0})
    parking, heard = Parking(CONTEXT, GRACE_S, clock), list[Event]()
    parking.take(stranded(clock, [ask(1, deadlines=impatient)], heard))
    clock.now_s += 3.0
    parking.expire()
    assert heard == [SequenceExpired(SequenceId(1), Limit.BETWEEN_TOKENS, 2.0, asked=True)]


def test_who_goes_away_meanwhile_is_forgotten(clock: Clock) -> None:
    parking, heard = Parking(CONTEXT, GRACE_S, clock), list[Event]()
    parking.take(stranded(clock, [ask(1), ask(2)], heard))
    parking.cancel([SequenceId(1), SequenceId(7)])
    parking.finish(SequenceId(2))
    assert parking.leave() == [] and not heard


def test_as_much_may_wait_as_in_the_queue(clock: Clock) -> None:
    parking, heard = Parking(CONTEXT, GRACE_S, clock, QueueLimits(requests=2)), list[Event]()
    parking.submit([ask(1), ask(2)], heard.append)
    with pytest.raises(AtCapacity):
        parking.submit([ask(3)], heard.append)
    with pytest.raises(RequestError):
        parking.submit([ask(4, max_tokens=CONTEXT)], heard.append)
    assert len(parking) == 2


def test_what_breaks_one_plan_after_the_other_is_not_tried_for_ever(clock: Clock) -> None:
    """A token in between shows that it was somebody else's doing."""
    heard = list[Event]()
    one = stranded(clock, [ask(1)], heard)[0]
    for patience in (BREAKS_MAX, 2):
        one.state.accept(5, clock())
        for _ in range(patience - 1):
            one.state.begin(CONTEXT, clock())
            one.state.strand()
            parking = Parking(CONTEXT, GRACE_S, clock)
            parking.take([one])
            assert len(parking) == 1 and not heard
    while not heard:
        one.state.begin(CONTEXT, clock())
        one.state.strand()
        parking = Parking(CONTEXT, GRACE_S, clock)
        parking.take([one])
    assert one.state.breaks == BREAKS_MAX
    assert isinstance(heard[0], SequenceFailed) and "plans in a row broke" in heard[0].reason


def test_who_only_waited_for_room_has_broken_nothing(clock: Clock) -> None:
    heard = list[Event]()
    one = stranded(clock, [ask(1)], heard)[0]
    for _ in range(BREAKS_MAX):
        one.state.strand()
        parking = Parking(CONTEXT, GRACE_S, clock)
        parking.take([one])
    assert len(parking) == 1 and not heard


# -- Going on --------------------------------------------------------------------------------------------


def adopted(clock: Clock, one: SequenceAsk, room: Room, drawn: int = 2) -> tuple[SequenceState, list[Event]]:
    state = stranded(clock, [one], [])[0].state
    for _ in range(drawn - 2):
        state.accept(5, clock())
    scheduler = Scheduler(room)
    return state, scheduler.adopt([state], clock())


def test_a_sequence_goes_on_with_its_tokens_from_the_beginning_of_the_cache(clock: Clock) -> None:
    state = stranded(clock, [ask(1)], [])[0].state
    scheduler = Scheduler(Room(2, CONTEXT, CONTEXT))
    assert scheduler.adopt([state], clock()) == []
    step = scheduler.next_step(clock())
    assert step is not None
    (row,) = step.rows
    assert (row.start, row.tokens) == (0, (1, 1, 1, 1, 5, 5))
    assert row.draw is not None and row.draw.prompt_tokens == 4


def test_what_is_too_long_for_the_machines_that_are_left_is_said(clock: Clock) -> None:
    _, events = adopted(clock, ask(1, max_tokens=50), Room(1, 40, 40))
    assert isinstance(events[0], SequenceFailed) and "a context of 40" in events[0].reason


def test_an_answer_whose_length_nobody_named_ends_where_the_smaller_context_does(clock: Clock) -> None:
    state, events = adopted(clock, ask(1, max_tokens=96, open_ended=True), Room(1, 40, 40))
    assert not events and state.ask.max_tokens == 36
    state, events = adopted(clock, ask(1, max_tokens=96, open_ended=True), Room(1, 40, 40), drawn=37)
    assert isinstance(events[0], SequenceFailed)


def test_stages_get_their_time_anew(clock: Clock) -> None:
    state = stranded(clock, [ask(1)], [])[0].state
    clock.now_s += 1000.0
    scheduler = Scheduler(Room(1, CONTEXT, CONTEXT))
    scheduler.adopt([state], clock())
    assert scheduler.expire(clock()) == []
    clock.now_s += Deadlines().between_tokens_s + 1
    assert isinstance(scheduler.expire(clock())[0], SequenceExpired)
