"""Whom a new sequence is forked from, what stays of those that have ended, and what makes way; one rule a test."""

from __future__ import annotations

import pytest

from cluster.rewinding import EXACT, Rewind
from cluster.steps import CacheVerb, Drawn, Drop, Fork, Honoured, Move, Sampling, Step, StepDone, StepFailed, Trim
from cluster.types import SequenceId
from coordinator.admission import Room
from coordinator.deadlines import Times
from coordinator.events import Event, PrefixCached
from coordinator.lanes import Lane
from coordinator.prefix_cache import AWAITED_TOKENS_MIN, SHARED_TOKENS_MIN, PrefixCache
from coordinator.scheduler import Scheduler
from coordinator.sequence import SequenceAsk, SequenceState

END = 2
PROMPT = tuple(range(100, 300))
NOW = 0.0


def scheduler(
    kv_tokens: int = 2000, sequences: int = 256, rewind: Rewind = EXACT, stages: int = 1, budget: int = 2048
) -> Scheduler:
    return Scheduler(Room(stages, kv_tokens, 1000, sequences, rewind), budget_tokens=budget)


def ask(number: int, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 4, **changes: object) -> SequenceAsk:
    values = {"sampling": Sampling(seed=1), "eos_ids": frozenset({END})} | changes
    return SequenceAsk(SequenceId(number), prompt, max_tokens=max_tokens, **values)  # type: ignore[arg-type]


def done(step: Step, token: int = 50, *, lost: int = 0) -> StepDone:
    """One token for every row that asks for one; of every cut and copy all but `lost` positions."""
    kept = []
    for verb in step.verbs:
        match verb:
            case Trim(seq, length) | Fork(_, seq, length) | Move(_, seq, length):
                kept.append(Honoured(seq, length - lost))
            case Drop():
                pass
    drawn = tuple(Drawn(row.seq, row.end, token) for row in step.rows if row.draw)
    return StepDone(step.id, drawn, tuple(kept), ())


def answered(it: Scheduler, *asks: SequenceAsk) -> list[Step]:
    """Every step until these and all others have ended."""
    it.submit(asks, NOW)
    steps = []
    while (step := it.next_step(NOW)) is not None:
        steps.append(step)
        it.complete(done(step), NOW)
    assert (it.running, it.waiting) == (0, 0)
    return steps


def verbs(steps: list[Step]) -> list[CacheVerb]:
    return [verb for step in steps for verb in step.verbs]


def computed(steps: list[Step], seq: int) -> list[tuple[int, int]]:
    return [(row.start, row.end) for step in steps for row in step.rows if row.seq == seq]


def test_what_has_ended_stays_and_a_longer_prompt_takes_its_place() -> None:
    it = scheduler()
    answered(it, ask(1))
    status = it.prefixes
    assert (status.retained_sequences, status.retained_tokens) == (1, 203)  # the last token was not computed
    steps = answered(it, ask(2, (*PROMPT, 50, 50, 50, 7, 8)))
    assert verbs(steps) == [Move(SequenceId(1), SequenceId(2), 203)]
    assert computed(steps, 2)[0] == (203, 205)
    assert it.prefixes.cached_tokens == 203


def test_what_ends_otherwise_than_the_prompt_begins_is_copied_and_stays() -> None:
    it = scheduler()
    answered(it, ask(1))
    assert verbs(answered(it, ask(2, (*PROMPT[:100], 7)))) == [Fork(SequenceId(1), SequenceId(2), 100)]
    assert it.prefixes.retained_sequences == 2


def test_the_last_token_of_a_prompt_is_computed_even_where_all_of_it_is_there() -> None:
    it = scheduler()
    answered(it, ask(1))
    steps = answered(it, ask(2, PROMPT[:100]))
    assert verbs(steps) == [Fork(SequenceId(1), SequenceId(2), 99)]
    assert computed(steps, 2)[0] == (99, 100)


def test_what_is_hardly_worth_a_trip_is_computed() -> None:
    it = scheduler()
    answered(it, ask(1))
    assert verbs(answered(it, ask(2, (*PROMPT[: SHARED_TOKENS_MIN - 1], 7, 8)))) == []


def test_another_salt_shares_nothing() -> None:
    it = scheduler()
    answered(it, ask(1, salt="ada"))
    assert verbs(answered(it, ask(2), ask(3, salt="bob"))) == []


def test_only_what_stages_honour_counts_and_the_rest_is_computed() -> None:
    """A stage that kept less is what all are cut back to."""
    it = scheduler()
    answered(it, ask(1))
    it.submit([ask(2, PROMPT[:100])], NOW)
    step = it.next_step(NOW)
    assert step is not None
    assert step.rows == ()
    it.complete(done(step, lost=39), NOW)
    step = it.next_step(NOW)
    assert step is not None
    assert step.verbs == (Trim(SequenceId(2), 60),)
    it.complete(done(step), NOW)
    events: list[Event] = []
    while (step := it.next_step(NOW)) is not None:
        events += it.complete(done(step), NOW)
    assert events[0] == PrefixCached(SequenceId(2), 60)


def test_what_is_needed_is_taken_from_the_least_recently_used() -> None:
    it = scheduler(kv_tokens=1000)
    for number, start in ((1, 0), (2, 1000), (3, 2000)):
        answered(it, ask(number, tuple(range(start + 100, start + 350))))
    answered(it, ask(4, (*range(100, 200), 7)))  # uses the first one
    assert it.prefixes.retained_tokens == 3 * 253 + 104
    steps = answered(it, ask(5, tuple(range(5000, 5200)), max_tokens=20))
    assert verbs(steps) == [Drop(SequenceId(2))]


def test_where_there_is_no_room_for_a_copy_its_source_is_taken() -> None:
    it = scheduler(kv_tokens=1000)
    answered(it, ask(1, tuple(range(100, 800))))
    steps = answered(it, ask(2, (*range(100, 400), 7), max_tokens=200))
    assert verbs(steps) == [Move(SequenceId(1), SequenceId(2), 300)]


def test_retained_sequences_leave_their_places_where_places_are_few() -> None:
    it = scheduler(sequences=2)
    for number in range(4):
        answered(it, ask(number, tuple(range(1000 * number, 1000 * number + 50))))
        assert it.prefixes.retained_sequences <= 2
    it.submit([ask(8, (7,) * 50), ask(9, (8,) * 50)], NOW)
    step = it.next_step(NOW)
    assert step is not None
    assert {verb.seq for verb in step.verbs if isinstance(verb, Drop)} == {2, 3}
    assert it.prefixes.retained_sequences == 0


def test_who_begins_alike_waits_for_the_one_that_computes_it() -> None:
    it = scheduler(budget=64)
    it.submit([ask(1), ask(2, (*PROMPT[:128], 7, 8))], NOW)
    seen: list[Step] = []
    while not any(row.seq == 2 for step in seen for row in step.rows):
        step = it.next_step(NOW)
        assert step is not None
        it.complete(done(step), NOW)
        seen.append(step)
    assert verbs(seen) == [Fork(SequenceId(1), SequenceId(2), 128)]
    assert computed(seen, 2) == [(128, 130)]


def test_nobody_waits_for_a_few_tokens() -> None:
    it = scheduler()
    steps = answered(it, ask(1), ask(2, (*PROMPT[: AWAITED_TOKENS_MIN - 1], 7)))
    assert {row.seq for row in steps[0].rows} == {1, 2}


def test_who_is_waited_for_stops_where_it_could_not_be_cut_back_to() -> None:
    """A state after 128 tokens, for the one that goes on otherwise from there."""
    it = scheduler(rewind=Rewind(every=256), budget=1000)
    steps = answered(it, ask(1), ask(2, (*PROMPT[:128], 7, 8)))
    assert computed(steps, 1)[:2] == [(0, 128), (128, 200)]
    assert verbs(steps) == [Fork(SequenceId(1), SequenceId(2), 128)]


def test_a_person_does_not_wait_for_a_batch() -> None:
    it = scheduler(budget=64)
    it.submit([ask(1, lane=Lane.BATCH)], NOW)
    step = it.next_step(NOW)
    assert step is not None
    it.complete(done(step), NOW)
    it.submit([ask(2)], NOW)
    step = it.next_step(NOW)
    assert step is not None
    assert step.verbs == (Fork(SequenceId(1), SequenceId(2), 64),)


def test_waiting_ends_when_the_other_one_fails() -> None:
    it = scheduler(budget=64)
    it.submit([ask(1), ask(2)], NOW)
    step = it.next_step(NOW)
    assert step is not None
    it.complete(StepFailed(step.id, 0, "NaN", (SequenceId(1),)), NOW)
    step = it.next_step(NOW)
    assert step is not None
    assert step.verbs == (Drop(SequenceId(1)),)
    assert [(row.seq, row.start) for row in step.rows] == [(2, 0)]


def test_who_is_waited_for_may_have_to_begin_again_in_the_same_moment() -> None:
    """Thrown out with too little to keep, and let in once more before anybody looks."""
    cache = PrefixCache(Room(1, 2000, 1000))
    first, second = (SequenceState(ask(number), number, number, Times(NOW)) for number in (1, 2))
    running = {state.ask.seq: state for state in (first, second)}
    for state in running.values():
        state.begin(300, NOW)
    assert cache.begin(running, 600) == []
    assert (first.fresh, second.fresh) == (False, True), "the second waits for what the first computes"
    assert cache.leave(first) == [Drop(first.ask.seq)]
    first.begin(300, NOW)
    running = {state.ask.seq: state for state in (second, first)}
    assert cache.begin(running, 600) == []
    assert not second.fresh


def test_a_cancelled_prompt_stays_as_far_as_it_was_computed() -> None:
    it = scheduler(budget=64)
    it.submit([ask(1)], NOW)
    step = it.next_step(NOW)
    assert step is not None
    it.complete(done(step), NOW)
    it.cancel(SequenceId(1))
    assert it.reserved_tokens == 0
    assert it.prefixes.retained_tokens == len(step.rows[0].tokens)
    assert it.next_step(NOW) is None


def test_a_new_plan_begins_with_nothing() -> None:
    it = scheduler()
    answered(it, ask(1))
    it.fail_all("a node is lost")
    assert it.prefixes.retained_tokens == 0
    assert verbs(answered(it, ask(2))) == []


@pytest.mark.parametrize("rewind", [Rewind(window=16), Rewind(every=256)])
def test_where_layers_forget_the_end_of_a_turn_is_kept_to_go_back_to(rewind: Rewind) -> None:
    """It could not be reached any more from the next turn's end."""
    it = scheduler(rewind=rewind)
    answered(it, ask(1))
    turn = (*PROMPT, 50, 50, 50, *range(600, 700))
    again = (*PROMPT, 50, 50, 50, *range(700, 800))
    assert verbs(answered(it, ask(2, turn))) == [Fork(SequenceId(1), SequenceId(2), 203)]
    assert verbs(answered(it, ask(3, again))) == [Fork(SequenceId(1), SequenceId(3), 203)]
