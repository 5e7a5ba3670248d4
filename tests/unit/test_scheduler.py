"""What the scheduler decides, one rule a test."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cluster.errors import AtCapacity, RequestError
from cluster.limits import QUEUED_REQUESTS_MAX, SEQUENCES_MAX
from cluster.steps import Drawn, Drop, Honoured, Sampling, Step, StepDone, StepFailed, StepOutcome, Trim
from cluster.types import SequenceId
from coordinator.admission import Room
from coordinator.events import Event, SequenceEnded, SequenceFailed, TokenDrawn
from coordinator.prefix_cache import PrefixCache
from coordinator.scheduler import Scheduler
from coordinator.sequence import EndReason, SequenceAsk

END = 2
NOW = 100.0


def ask(number: int, prompt: int = 3, max_tokens: int = 4, **changes: object) -> SequenceAsk:
    values = {"sampling": Sampling(seed=1), "eos_ids": frozenset({END})} | changes
    return SequenceAsk(SequenceId(number), tuple(range(10, 10 + prompt)), max_tokens=max_tokens, **values)  # type: ignore[arg-type]


def scheduler(
    stages: int = 1, kv_tokens: int = 1000, context: int = 500, budget: int = 8, sequences: int = SEQUENCES_MAX
) -> Scheduler:
    """Keeps nothing of what has ended: `test_prefix_cache` is about that."""
    room = Room(stages, kv_tokens, context, sequences)
    return Scheduler(room, budget_tokens=budget, prefixes=PrefixCache(room, enabled=False))


def done(step: Step, token: int = 50) -> StepDone:
    """A stage's honest answer: one token for every row that asked for one, every trim as asked."""
    drawn = tuple(Drawn(row.seq, row.end, token) for row in step.rows if row.draw)
    kept = tuple(Honoured(verb.seq, verb.length) for verb in step.verbs if isinstance(verb, Trim))
    return StepDone(step.id, drawn, kept, ())


def complete(it: Scheduler, outcome: StepOutcome) -> list[Event]:
    return it.complete(outcome, NOW)


def step_of(it: Scheduler) -> Step:
    step = it.next_step(NOW)
    assert step is not None
    return step


def spans(step: Step) -> list[tuple[int, int, int, bool]]:
    return [(row.seq, row.start, row.end, row.draw is not None) for row in step.rows]


def failures(events: Sequence[Event]) -> list[int]:
    return [event.seq for event in events if isinstance(event, SequenceFailed)]


def test_a_prompt_is_prefilled_in_chunks_and_only_the_last_one_draws() -> None:
    it = scheduler(budget=4)
    it.submit([ask(1, prompt=10)], NOW)
    chunks = []
    for _ in range(3):
        step = step_of(it)
        chunks += spans(step)
        complete(it, done(step))
    assert chunks == [(1, 0, 4, False), (1, 4, 8, False), (1, 8, 10, True)]


def test_chunks_of_one_prompt_follow_each_other_without_waiting() -> None:
    it = scheduler(stages=3, budget=4)
    it.submit([ask(1, prompt=12)], NOW)
    assert [spans(step_of(it)) for _ in range(3)] == [[(1, 0, 4, False)], [(1, 4, 8, False)], [(1, 8, 12, True)]]
    assert it.next_step(NOW) is None


def test_decode_rows_go_before_prefill_chunks_in_the_same_budget() -> None:
    it = scheduler(budget=4)
    it.submit([ask(1)], NOW)
    complete(it, done(step_of(it)))
    it.submit([ask(2, prompt=9)], NOW)
    assert spans(step_of(it)) == [(1, 3, 4, True), (2, 0, 3, False)]


def test_decoding_sequences_are_spread_over_the_stages() -> None:
    it = scheduler(stages=2, budget=64)
    it.submit([ask(number) for number in range(4)], NOW)
    complete(it, done(step_of(it)))
    first, second = step_of(it), step_of(it)
    assert [len(first.rows), len(second.rows)] == [2, 2]
    assert {row.seq for row in first.rows}.isdisjoint(row.seq for row in second.rows)


def test_a_sequence_is_in_one_decode_step_at_a_time() -> None:
    it = scheduler(stages=2)
    it.submit([ask(1)], NOW)
    complete(it, done(step_of(it)))
    step_of(it)
    assert it.next_step(NOW) is None


def test_end_of_sequence_ends_it_and_frees_its_cache() -> None:
    it = scheduler()
    it.submit([ask(1)], NOW)
    events = complete(it, done(step_of(it), END))
    assert events == [TokenDrawn(SequenceId(1), END), SequenceEnded(SequenceId(1), EndReason.STOP)]
    assert step_of(it).verbs == (Drop(SequenceId(1)),)
    assert it.reserved_tokens == 0


def test_max_tokens_ends_it_with_length() -> None:
    it = scheduler()
    it.submit([ask(1, max_tokens=2)], NOW)
    complete(it, done(step_of(it)))
    assert complete(it, done(step_of(it)))[-1] == SequenceEnded(SequenceId(1), EndReason.LENGTH)


def test_min_tokens_bans_the_end_until_then() -> None:
    it = scheduler()
    it.submit([ask(1, min_tokens=2)], NOW)
    banned = []
    for _ in range(3):
        step = step_of(it)
        draw = step.rows[0].draw
        assert draw is not None
        banned.append(draw.banned)
        complete(it, done(step))
    assert banned == [(END,), (END,), ()]


def test_ignore_eos_goes_on_after_the_end() -> None:
    it = scheduler()
    it.submit([ask(1, ignore_eos=True)], NOW)
    assert complete(it, done(step_of(it), END)) == [TokenDrawn(SequenceId(1), END)]


def test_what_does_not_fit_the_cache_waits_and_is_not_overtaken() -> None:
    it = scheduler(kv_tokens=20)
    it.submit([ask(1, prompt=10, max_tokens=5), ask(2, prompt=10, max_tokens=5), ask(3, prompt=1, max_tokens=1)], NOW)
    step = step_of(it)
    assert {row.seq for row in step.rows} == {1}
    assert (it.running, it.waiting) == (1, 2)


def test_more_than_the_context_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="context of 500"):
        scheduler().submit([ask(1, prompt=490, max_tokens=11)], NOW)


def test_a_full_queue_says_when_to_come_back() -> None:
    it = scheduler()
    it.submit([ask(number) for number in range(QUEUED_REQUESTS_MAX)], NOW)
    with pytest.raises(AtCapacity) as refusal:
        it.submit([ask(999)], NOW)
    assert refusal.value.retry_after_s > 0


def test_cancel_drops_the_cache_and_ignores_what_crosses_with_it() -> None:
    it = scheduler(stages=2)
    it.submit([ask(1)], NOW)
    step = step_of(it)
    it.cancel(SequenceId(1))
    assert step_of(it).verbs == (Drop(SequenceId(1)),)
    assert complete(it, done(step)) == []
    assert it.reserved_tokens == 0


def test_cancel_takes_a_waiting_request_out_of_the_queue() -> None:
    it = scheduler(kv_tokens=8)
    it.submit([ask(1), ask(2)], NOW)
    step_of(it)
    it.cancel(SequenceId(2))
    assert it.waiting == 0


def test_a_blamed_sequence_fails_and_the_others_are_cut_back_and_go_on() -> None:
    it = scheduler(budget=64)
    it.submit([ask(1), ask(2)], NOW)
    step = step_of(it)
    assert failures(complete(it, StepFailed(step.id, 1, "bad", (SequenceId(1),)))) == [1]
    repair = step_of(it)
    assert set(repair.verbs) == {Drop(SequenceId(1)), Trim(SequenceId(2), 0)}
    assert repair.rows == ()
    complete(it, done(repair))
    assert spans(step_of(it)) == [(2, 0, 3, True)]


def test_where_nobody_is_to_blame_each_row_is_tried_alone() -> None:
    it = scheduler(budget=64)
    it.submit([ask(1), ask(2)], NOW)
    complete(it, StepFailed(step_of(it).id, 0, "out of memory"))
    complete(it, done(step_of(it)))  # the trims
    alone = step_of(it)
    assert [row.seq for row in alone.rows] == [1]
    complete(it, done(alone))
    assert [row.seq for row in step_of(it).rows] == [2]


def test_a_trim_that_kept_less_prefills_the_rest() -> None:
    it = scheduler(budget=64)
    it.submit([ask(1, prompt=6), ask(2)], NOW)
    complete(it, done(step_of(it)))
    complete(it, StepFailed(step_of(it).id, 0, "lost"))
    repair = step_of(it)
    assert set(repair.verbs) == {Trim(SequenceId(1), 6), Trim(SequenceId(2), 3)}
    complete(it, StepDone(repair.id, (), (Honoured(SequenceId(1), 0), Honoured(SequenceId(2), 3)), ()))
    again = step_of(it)  # other stages may have kept all 6, so all are cut to what the worst one has
    assert again.verbs == (Trim(SequenceId(1), 0),)
    complete(it, done(again))
    assert (1, 0, 7, True) in spans(step_of(it))


def test_a_chunk_that_follows_a_failed_one_is_not_to_blame() -> None:
    it = scheduler(stages=2, budget=8)
    it.submit([ask(1)], NOW)
    complete(it, done(step_of(it)))
    it.submit([ask(2, prompt=12)], NOW)
    shared, alone = step_of(it), step_of(it)
    assert ([row.seq for row in shared.rows], [row.seq for row in alone.rows]) == ([1, 2], [2])
    complete(it, StepFailed(shared.id, 0, "NaN"))
    assert complete(it, StepFailed(alone.id, 0, "does not continue its cache", (SequenceId(2),))) == []
    assert it.running == 2


def test_chunks_still_under_way_are_awaited_before_the_cut() -> None:
    it = scheduler(stages=2, budget=4)
    it.submit([ask(1, prompt=8)], NOW)
    first, second = step_of(it), step_of(it)
    complete(it, StepFailed(first.id, 0, "lost"))
    assert it.next_step(NOW) is None
    complete(it, StepFailed(second.id, 0, "starts at 4, not at 0"))
    assert Trim(SequenceId(1), 0) in step_of(it).verbs


def test_fail_all_ends_everything_once() -> None:
    it = scheduler(kv_tokens=10)
    it.submit([ask(1), ask(2)], NOW)
    step = step_of(it)
    assert failures(it.fail_all("the pipeline broke")) == [1, 2]
    assert complete(it, done(step)) == []
    assert (it.running, it.waiting, it.in_flight, it.reserved_tokens) == (0, 0, 0, 0)


def test_where_sequences_cost_memory_however_short_they_are_no_more_live_than_were_promised() -> None:
    it = scheduler(sequences=2)
    it.submit([ask(number, prompt=1) for number in range(3)], NOW)
    step = step_of(it)
    assert [row.seq for row in step.rows] == [0, 1]
    complete(it, done(step, token=END))
    step = step_of(it)
    assert [row.seq for row in step.rows] == [2]
    assert {verb.seq for verb in step.verbs if isinstance(verb, Drop)} == {0, 1}
