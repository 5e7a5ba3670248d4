"""Who has room, who gives it back, who is turned away; one rule a test, through the scheduler."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import AtCapacity, RequestError
from cluster.limits import BATCH_PATIENCE_S, QUEUED_PROMPT_TOKENS_MAX, QUEUED_REQUESTS_MAX
from cluster.steps import CacheVerb, Drop
from cluster.types import SequenceId
from coordinator.admission import Admission, Room
from coordinator.deadlines import Deadlines, Times
from coordinator.lanes import Lane
from coordinator.promises import ANSWER_TOKENS_FIRST, ANSWERS_BELIEVED, Promises
from coordinator.scheduler import Scheduler
from coordinator.sequence import SequenceState
from tests.unit.test_scheduler import END, NOW, ask, done, scheduler, step_of


def turn(it: Scheduler, token: int = 50, now: float = NOW) -> list[int]:
    """One step, answered at once; returns the sequences in it."""
    step = it.next_step(now)
    assert step is not None
    it.complete(done(step, token), now)
    return [row.seq for row in step.rows]


def test_what_names_no_length_is_promised_what_answers_usually_take() -> None:
    it = scheduler(kv_tokens=2000, context=2000, budget=64)
    it.submit([ask(number, max_tokens=1900, open_ended=True) for number in range(3)], NOW)
    assert turn(it) == [0, 1, 2]
    assert it.reserved_tokens == 3 * (3 + ANSWER_TOKENS_FIRST)


def test_the_promise_is_learnt_from_answers_that_ended() -> None:
    it = scheduler(kv_tokens=2000, context=2000, budget=64)
    for number in range(ANSWERS_BELIEVED):
        it.submit([ask(number, max_tokens=1900, open_ended=True)], NOW)
        for _ in range(9):
            turn(it)
        turn(it, END)
    it.submit([ask(99, max_tokens=1900, open_ended=True)], NOW)
    step_of(it)
    assert it.reserved_tokens == 3 + 10


def test_four_of_five_answers_stay_within_their_promise() -> None:
    it = scheduler(kv_tokens=2000, context=2000, budget=64)
    for length in range(1, ANSWERS_BELIEVED + 1):
        it.submit([ask(length, max_tokens=1900, open_ended=True)], NOW)
        for _ in range(length - 1):
            turn(it)
        turn(it, END)
    it.submit([ask(99, max_tokens=1900, open_ended=True)], NOW)
    step_of(it)
    assert it.reserved_tokens == 3 + 7  # of the lengths 1 to 8


def test_answers_that_took_too_long_teach_nothing() -> None:
    it = scheduler(kv_tokens=2000, context=2000, budget=64)
    hurried = Deadlines(between_tokens_s=1)
    for number in range(ANSWERS_BELIEVED):
        it.submit([ask(number, max_tokens=1900, open_ended=True, deadlines=hurried)], NOW)
        turn(it)
        assert len(it.expire(NOW + 1)) == 1
    it.submit([ask(99, max_tokens=1900, open_ended=True)], NOW)
    step_of(it)
    assert it.reserved_tokens == 3 + ANSWER_TOKENS_FIRST


def open_ended(it: Scheduler, count: int) -> None:
    it.submit([ask(number, max_tokens=900, open_ended=True) for number in range(count)], NOW)


def test_when_promises_were_too_small_the_youngest_starts_again_later() -> None:
    """Two sequences with 515 promised each in 1,100: the older one goes on to its end, then the younger one."""
    it = scheduler(kv_tokens=1100, context=1000, budget=64)
    open_ended(it, 2)
    dropped: list[int] = []
    drawn = {0: 0, 1: 0}
    while it.running or it.waiting or it.in_flight:
        step = step_of(it)
        dropped += [verb.seq for verb in step.verbs if isinstance(verb, Drop)]
        for event in it.complete(done(step), NOW):
            if hasattr(event, "token"):
                drawn[event.seq] += 1
        assert it.reserved_tokens <= 1100
    assert dropped == [1, 0]  # thrown out, and ended
    assert step_of(it).verbs == (Drop(SequenceId(1)),)
    assert drawn == {0: 900, 1: 900}


def test_who_starts_again_computes_its_tokens_and_draws_the_next_one() -> None:
    it = scheduler(kv_tokens=1100, context=1000, budget=2048)
    open_ended(it, 2)
    while True:
        step = step_of(it)
        if Drop(SequenceId(1)) in step.verbs:
            break
        it.complete(done(step), NOW)
    it.complete(done(step), NOW)
    it.cancel(SequenceId(0))
    first = step_of(it)
    it.complete(done(first), NOW)
    second = step_of(it)
    assert [(row.seq, row.start, row.end, row.draw is not None) for row in (*first.rows, *second.rows)] == [
        (1, 0, 512, False),
        (1, 512, second.rows[0].end, True),
    ]


def test_who_named_a_length_is_not_thrown_out_for_who_did_not() -> None:
    it = scheduler(kv_tokens=1230, context=1000, budget=64)
    it.submit([ask(0, max_tokens=900, open_ended=True)], NOW)
    it.submit([ask(1, max_tokens=700)], NOW)
    verbs: list[CacheVerb] = []
    rows: list[int] = []
    while it.running > 1 or not rows:
        step = step_of(it)
        verbs += step.verbs
        rows.append(len(step.rows))
        it.complete(done(step), NOW)
    assert verbs == []
    assert (rows[0], rows[-1]) == (2, 1), "there was room enough for both"
    assert [row.seq for row in step_of(it).rows] == [0]


def test_an_interactive_request_takes_the_place_of_batch_ones_but_not_of_the_first() -> None:
    it = scheduler(kv_tokens=90, budget=64)
    it.submit([ask(number, max_tokens=27, lane=Lane.BATCH) for number in range(3)], NOW)
    assert turn(it) == [0, 1, 2]
    it.submit([ask(10, max_tokens=27)], NOW)
    step = step_of(it)
    assert step.verbs == (Drop(SequenceId(2)),)
    assert {row.seq for row in step.rows} == {0, 1, 10}
    it.complete(done(step), NOW)
    it.submit([ask(11, max_tokens=57)], NOW)
    assert step_of(it).verbs == (), "more than the batch lane may be asked for"


def test_a_batch_sequence_is_thrown_out_once_for_a_newcomer() -> None:
    it = scheduler(kv_tokens=60, budget=64)
    it.submit([ask(number, max_tokens=27, lane=Lane.BATCH) for number in range(2)], NOW)
    turn(it)
    it.submit([ask(10, max_tokens=27)], NOW)
    turn(it)
    it.cancel(SequenceId(10))
    assert turn(it) == [0, 1]
    it.submit([ask(11, max_tokens=27)], NOW)
    assert turn(it) == [0, 1]


def test_a_large_batch_request_does_not_stop_interactive_ones_until_it_has_waited_long() -> None:
    it = scheduler(kv_tokens=60, budget=64)
    it.submit([ask(0, max_tokens=27)], NOW)
    turn(it)
    it.submit([ask(1, max_tokens=57, lane=Lane.BATCH)], NOW)
    it.submit([ask(2, max_tokens=20), ask(3, max_tokens=20)], NOW)
    assert turn(it) == [0, 2]
    it.cancel(SequenceId(2))
    late = NOW + BATCH_PATIENCE_S
    it._admission._queue._turns.serve(Lane.INTERACTIVE, "", 1000)  # it is the batch lane's turn
    assert turn(it, now=late) == [0]


def test_clients_take_turns_whoever_sends_more() -> None:
    it = scheduler(kv_tokens=14, budget=64)
    it.submit([ask(number, client="many") for number in range(6)], NOW)
    it.submit([ask(10 + number, client="few") for number in range(2)], NOW)
    order: list[int] = []
    while it.running or it.waiting:
        order += [seq for seq in turn(it, END) if seq not in order]
    assert order[:4] in ([0, 1, 10, 11], [0, 10, 1, 11])


def test_a_queue_full_of_prompt_tokens_takes_no_more() -> None:
    it = scheduler(kv_tokens=1 << 20, context=1 << 20)
    long = QUEUED_PROMPT_TOKENS_MAX // 2
    it.submit([ask(0, prompt=long), ask(1, prompt=long)], NOW)
    with pytest.raises(AtCapacity, match="prompt tokens"):
        it.submit([ask(2, prompt=1)], NOW)


def test_a_prompt_of_several_choices_waits_once() -> None:
    it = scheduler(kv_tokens=1 << 20, context=1 << 20)
    one = ask(0, prompt=QUEUED_PROMPT_TOKENS_MAX // 4)
    it.submit([replace(one, seq=SequenceId(number)) for number in range(4)], NOW)
    it.submit([ask(10, prompt=QUEUED_PROMPT_TOKENS_MAX // 2)], NOW)
    with pytest.raises(AtCapacity, match="prompt tokens"):
        it.submit([ask(11, prompt=QUEUED_PROMPT_TOKENS_MAX // 2)], NOW)


def test_an_empty_queue_takes_any_one_request() -> None:
    it = scheduler(kv_tokens=1 << 20, context=1 << 20)
    it.submit([ask(0, prompt=QUEUED_PROMPT_TOKENS_MAX + 1)], NOW)
    assert it.waiting == 1


def test_a_full_batch_lane_leaves_the_interactive_one_open() -> None:
    it = scheduler()
    it.submit([ask(number, lane=Lane.BATCH) for number in range(QUEUED_REQUESTS_MAX)], NOW)
    with pytest.raises(AtCapacity):
        it.submit([ask(900, lane=Lane.BATCH)], NOW)
    it.submit([ask(901)], NOW)


def test_who_is_turned_away_hears_when_there_will_be_room_at_the_rate_of_late() -> None:
    """One leaves the queue every three seconds, and four places are missing."""
    it = scheduler(kv_tokens=7, budget=64)
    it.submit([ask(number) for number in range(QUEUED_REQUESTS_MAX)], NOW)
    for number in range(5):
        turn(it, END, now=NOW + 3 * number)
    it.submit([ask(500 + number) for number in range(5)], NOW + 15)
    with pytest.raises(AtCapacity) as refusal:
        it.submit([ask(900 + number) for number in range(4)], NOW + 15)
    assert refusal.value.retry_after_s == pytest.approx(12, rel=0.3)


def test_more_than_all_the_cache_is_refused_at_once() -> None:
    with pytest.raises(RequestError, match="exceed"):
        scheduler(kv_tokens=100).submit([ask(1, prompt=90, max_tokens=11)], NOW)


def crowded() -> tuple[Admission, SequenceState, SequenceState]:
    """Two sequences of 3 prompt tokens, promised 40 more each, where 100 tokens have room; and a third one waits."""
    admission = Admission(Room(1, 100, 100), Promises(first_tokens=40))
    states = [
        SequenceState(ask(number, max_tokens=90, open_ended=number < 2), number, number, Times(NOW))
        for number in range(3)
    ]
    for state in states:
        admission.submit(state)
    assert admission.admit(NOW) == []
    assert (len(admission.running), admission.waiting) == (2, 1)
    return admission, states[0], states[1]


def test_who_outgrows_its_promise_takes_room_from_juniors_only() -> None:
    admission, old, young = crowded()
    young.tokens += [50] * 60
    assert admission.admit(NOW) == []
    assert not young.has_room
    old.tokens += [50] * 60
    assert admission.admit(NOW) == [young]
    assert old.has_room


def test_nobody_comes_in_while_somebody_waits_for_room_to_go_on() -> None:
    admission, _, young = crowded()
    young.tokens += [50] * 60
    newcomer = SequenceState(ask(9, prompt=1, max_tokens=1, client="other"), 9, 9, Times(NOW))
    admission.submit(newcomer)
    admission.admit(NOW)
    assert newcomer.ask.seq not in admission.running


def test_who_is_being_cut_back_is_not_thrown_out_before_that_is_done() -> None:
    """What its trim kept would otherwise be believed of the cache that it fills again."""
    admission, old, young = crowded()
    old.tokens += [50] * 60
    young.trimming_to = 1
    assert admission.admit(NOW) == []
    young.cut_to(1)
    assert admission.admit(NOW) == [young]
