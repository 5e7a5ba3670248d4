"""Which sequences lie together in the MLX engine's KV memory, and when they move."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.types import SequenceId
from node.engines.mlx.cache import KvCache
from node.engines.mlx.lane import KvShape
from node.engines.mlx.positions import LayerCache, Positions

SHAPE = KvShape(heads=2, key_size=64, value_size=64, dtype=mx.float32)


def small_cache(kv_tokens: int = 100_000, padding_tokens_max: int = 100_000) -> KvCache:
    padding_bytes_max = padding_tokens_max * SHAPE.bytes
    return KvCache([SHAPE], kv_tokens=kv_tokens, context_tokens=kv_tokens, padding_bytes_max=padding_bytes_max)


def grown(cache: KvCache, **lengths: int) -> list[SequenceId]:
    seqs = [SequenceId(index) for index in range(len(lengths))]
    for seq, length in zip(seqs, lengths.values(), strict=True):
        for lane in cache.lanes_for({seq: length}):
            cache.commit(lane, length, {})
    return seqs


def test_sequences_that_go_on_together_stay_where_they_are() -> None:
    cache = small_cache()
    seqs = grown(cache, a=100, b=300)
    (lane,) = cache.lanes_for(dict.fromkeys(seqs, 1))
    keys, _ = lane.stored(0)
    for _ in range(10):
        assert cache.lanes_for(dict.fromkeys(reversed(seqs), 1)) == [lane]
        cache.commit(lane, 1, {})
    assert lane.stored(0)[0] is keys


def test_sequences_that_want_different_numbers_of_tokens_are_in_different_lanes() -> None:
    cache = small_cache()
    one, two, three = grown(cache, a=10, b=10, c=10)
    lanes = cache.lanes_for({one: 1, two: 5, three: 1})
    assert sorted(sorted(lane.live) for lane in lanes) == [[one, three], [two]]


def test_padding_that_costs_more_than_another_forward_is_avoided() -> None:
    cache = small_cache(padding_tokens_max=500)
    one, two, three = grown(cache, a=10, b=200, c=2000)
    lanes = cache.lanes_for({three: 1, one: 1, two: 1})
    assert sorted(sorted(lane.live) for lane in lanes) == [[one, two], [three]]


def test_who_stays_behind_keeps_its_positions_when_others_leave_its_lane() -> None:
    cache = small_cache()
    one, two, three = grown(cache, a=10, b=20, c=30)
    (lane,) = cache.lanes_for({one: 1, two: 1, three: 1})
    marks = mx.array([seq + 1 for seq in lane.live], mx.float32).reshape(3, 1, 1, 1)
    lane.store(0, *(array + marks for array in lane.stored(0)))
    cache.lanes_for({one: 1, three: 1})
    (left,) = cache.lanes_for({two: 1})
    assert left.live == [two]
    assert left.stored(0)[0][0, :, :20].min().item() == two + 1 == left.stored(0)[1][0, :, :20].max().item()


def test_a_step_writes_into_its_lane_in_place() -> None:
    """A decode step of two ragged rows needs a few kilobytes beside 8 MB of keys and values, not another 8 MB."""
    cache = small_cache(kv_tokens=8192)
    one, two = grown(cache, a=3000, b=2000)
    (lane,) = cache.lanes_for({one: 1, two: 1})
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
