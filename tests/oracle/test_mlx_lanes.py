"""Which sequences lie together in the MLX engine's KV memory, and when they move."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.types import SequenceId
from node.engines.mlx.cache import KvCache
from node.engines.mlx.lane import KvShape, Lane, Span
from node.engines.mlx.positions import LayerCache, Positions
from tests.oracle.mlx_counts import addresses

SHAPE = KvShape(heads=2, key_size=64, value_size=64, dtype=mx.float32)


def small_cache(kv_tokens: int = 100_000, padding_tokens_max: int = 100_000) -> KvCache:
    padding_bytes_max = padding_tokens_max * SHAPE.bytes
    return KvCache([SHAPE], kv_tokens=kv_tokens, context_tokens=kv_tokens, padding_bytes_max=padding_bytes_max)


def grown(cache: KvCache, *lengths: int) -> list[SequenceId]:
    seqs = [SequenceId(index) for index in range(len(lengths))]
    for seq, length in zip(seqs, lengths, strict=True):
        step(cache, {seq: length})
    return seqs


def step(cache: KvCache, wanted: dict[SequenceId, int]) -> list[Span]:
    spans = cache.spans_for(wanted)
    for span in spans:
        cache.commit(span, wanted[span.seated[0][1]], {})
    return spans


def decoded(cache: KvCache, *seqs: SequenceId) -> Span:
    (span,) = step(cache, dict.fromkeys(seqs, 1))
    return span


def mark(lane: Lane) -> None:
    """Write into each row whose it is."""
    marks = mx.array([-1 if seq is None else seq + 1 for seq in lane.rows], mx.float32).reshape(-1, 1, 1, 1)
    lane.store(0, *(array + marks for array in lane.stored(0)))
    mx.eval(lane.stored(0))


def marks(span: Span, length: int) -> list[float]:
    """What is written in the first positions of each row."""
    keys, values = (array[span.first : span.first + len(span.seqs), :, :length] for array in span.lane.stored(0))
    assert keys.min(axis=(1, 2, 3)).tolist() == values.max(axis=(1, 2, 3)).tolist()
    found: list[float] = keys.max(axis=(1, 2, 3)).tolist()
    return found


def test_sequences_that_go_on_together_stay_where_they_are() -> None:
    cache = small_cache()
    seqs = grown(cache, 100, 300)
    span = decoded(cache, *seqs)
    keys, _ = span.lane.stored(0)
    for _ in range(10):
        assert decoded(cache, *reversed(seqs)) == span
    assert span.lane.stored(0)[0] is keys


def test_sequences_that_want_different_numbers_of_tokens_are_in_different_lanes() -> None:
    cache = small_cache()
    one, two, three = grown(cache, 10, 10, 10)
    decoded(cache, one, two, three)
    spans = step(cache, {one: 1, two: 5, three: 1})
    assert [sorted(seq for _, seq in span.seated) for span in spans] == [[one, three], [two]]
    assert spans[0].lane is not spans[1].lane


def test_padding_that_costs_more_than_another_forward_is_avoided() -> None:
    cache = small_cache(padding_tokens_max=500)
    one, two, three = grown(cache, 10, 200, 2000)
    spans = step(cache, {three: 1, one: 1, two: 1})
    assert [sorted(span.lane.live) for span in spans] == [[one, two], [three]]


def test_who_stays_behind_keeps_its_positions_when_others_leave_its_lane() -> None:
    cache = small_cache()
    one, two, three, four, five = grown(cache, 10, 20, 30, 40, 50)
    mark(decoded(cache, one, two, three, four, five).lane)
    left = decoded(cache, one, five)
    assert sorted(left.lane.live) == [one, five]
    assert marks(left, 10) == [one + 1, five + 1]
    for seq in (two, three, four):
        stayed = decoded(cache, seq)
        assert sorted(stayed.lane.live) == [two, three, four]
        assert marks(stayed, 20) == [seq + 1]


def test_when_one_ends_nobody_moves() -> None:
    """Its row is computed for nobody, until another one takes it."""
    cache = small_cache()
    seqs = grown(cache, *range(20, 28))
    span = decoded(cache, *seqs)
    (stored,) = span.lane.arrays
    cache.drop(seqs[3])
    after = decoded(cache, *seqs[:3], *seqs[4:])
    assert after.lane.arrays[0] is stored
    assert after.seqs == tuple(None if seq == seqs[3] else seq for seq in span.seqs)


def test_who_joins_is_copied_into_an_empty_row_and_nothing_else_is() -> None:
    cache = small_cache()
    seqs = grown(cache, *range(20, 28))
    lane = decoded(cache, *seqs[:7]).lane
    mark(lane)
    cache.drop(seqs[3])
    mark(decoded(cache, seqs[7]).lane)
    before = addresses(lane.arrays)
    joined = decoded(cache, *seqs[:3], *seqs[4:])
    assert joined.lane is lane and None not in joined.seqs
    assert addresses(lane.arrays) == before
    assert marks(joined, 20) == [seq + 1 for seq in joined.seqs if seq is not None]
    row = lane.rows.index(seqs[7])
    assert lane.stored(0)[0][row, :, 29:].max().item() == 0, "what the one before has left could be no number"


def test_a_company_that_grows_has_room_for_more() -> None:
    cache = small_cache()
    seqs = grown(cache, *[20] * 32)
    lanes = [decoded(cache, *seqs[:count]).lane for count in range(1, 33)]
    assert len({id(lane) for lane in lanes}) <= 8


def test_few_sequences_far_apart_in_a_lane_leave_it_together() -> None:
    cache = small_cache()
    seqs = grown(cache, *[20] * 8)
    lane = decoded(cache, *seqs).lane
    mark(lane)
    first, last = lane.live[0], lane.live[-1]
    span = decoded(cache, first, last)
    assert span.lane is not lane and None not in span.seqs
    assert marks(span, 20) == [first + 1, last + 1]


def test_empty_rows_go_before_the_promise_is_broken() -> None:
    cache = small_cache(kv_tokens=8 * 96)
    seqs = grown(cache, *[20] * 6)
    decoded(cache, *seqs)
    for seq in seqs[:3]:
        cache.drop(seq)
    (span,) = step(cache, {SequenceId(9): 400})
    lanes = {id(lane): lane for lane in (span.lane, *(decoded(cache, seq).lane for seq in seqs[3:]))}
    assert sum(lane.tokens for lane in lanes.values()) <= 8 * 96


def test_who_waits_makes_room_before_a_company_is_parted() -> None:
    """Ended chats may be kept, in as much memory as is left. Those that go on still compute together."""
    cache = small_cache(kv_tokens=8 * 96)
    seqs = grown(cache, *[20] * 6)
    decoded(cache, *seqs)
    for _ in range(170):
        span = decoded(cache, *seqs[3:])
        waiting = {id(lane): lane for seq in seqs[:3] if (lane := cache.lane_of(seq)) is not span.lane}
        assert span.lane.tokens + sum(lane.tokens for lane in waiting.values()) <= 8 * 96


def test_no_lane_is_rounded_up_beyond_the_promise() -> None:
    """As many short sequences as fill what was promised, where each rounded up would take twice as much. They compute
    together, also while a long one takes what they leave."""
    cache = small_cache(kv_tokens=8 * 32)
    seqs = [SequenceId(index) for index in range(16)]
    step(cache, dict.fromkeys(seqs, 3))
    for new in range(5):
        spans = step(cache, dict.fromkeys(seqs, 1) | ({SequenceId(99): 128} if new == 0 else {}))
        lanes = [cache.lane_of(SequenceId(99)), cache.lane_of(seqs[0])]
        assert len(spans) == 1 + (new == 0) and len({id(cache.lane_of(seq)) for seq in seqs}) == 1
        assert sum(lane.tokens for lane in lanes) <= 8 * 32
    assert cache.used_tokens == 8 * 32


def test_sequences_that_fill_the_promise_to_the_last_position_part() -> None:
    cache = small_cache(kv_tokens=200)
    seqs = grown(cache, 99, 51, 44)
    for seq in seqs:
        mark(cache.lane_of(seq))
    for _ in range(2):
        spans = step(cache, dict.fromkeys(seqs, 1))
        assert len(spans) == 3 and sum(span.lane.tokens for span in spans) <= 200
    assert [marks(span, 44) for span in spans] == [[seq + 1] for span in spans for seq in span.lane.live]


def test_a_fork_takes_no_more_than_is_left() -> None:
    cache = small_cache(kv_tokens=100)
    (seq,) = grown(cache, 50)
    mark(cache.lane_of(seq))
    assert cache.fork(seq, SequenceId(7), 50) == 50
    assert cache.lane_of(seq).tokens + cache.lane_of(SequenceId(7)).tokens <= 100
    assert cache.lane_of(SequenceId(7)).stored(0)[0][:, :, :50].min().item() == seq + 1


@pytest.mark.parametrize("starts", [[40 + place for place in range(8)], [40] * 8], ids=["ragged", "equal"])
def test_nothing_is_written_where_a_row_is_computed_for_nobody(starts: list[int]) -> None:
    cache = small_cache()
    seqs = grown(cache, *range(20, 28))
    lane = decoded(cache, *seqs).lane
    mark(lane)
    idle = lane.live[3]
    span = decoded(cache, *(seq for seq in seqs if seq != idle))
    assert span.seqs[3] is None
    layer = LayerCache(Positions(starts, 1, lane.capacity, live=span.live), None, *lane.stored(0))
    layer.update_and_fetch(mx.full((8, 2, 1, 64), 99.0), mx.full((8, 2, 1, 64), 99.0))
    written = (layer.keys == 99.0).sum(axis=(1, 2, 3)).tolist()
    assert written[:8] == [0 if place == 3 else 2 * 64 for place in range(8)] and not any(written[8:])


def test_a_step_writes_into_its_lane_in_place() -> None:
    """A decode step of two ragged rows needs a few kilobytes beside 8 MB of keys and values, not another 8 MB."""
    cache = small_cache(kv_tokens=8192)
    one, two = grown(cache, 3000, 2000)
    lane = decoded(cache, one, two).lane
    new = mx.ones((2, 2, 1, 64))
    mx.eval(new)
    for starts in ([3000, 2000], [3001, 3001]):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        layer = LayerCache(Positions(starts, 1, lane.capacity), None, *lane.stored(0))
        layer.update_and_fetch(new, new)
        lane.store(0, layer.keys, layer.values)
        del layer
        mx.eval(lane.stored(0))
        assert mx.get_peak_memory() - before < lane.bytes / 20
