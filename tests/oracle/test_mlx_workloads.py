"""Whatever joins, leaves, is copied or cut back: every sequence keeps what was written for it, within the promise."""

from __future__ import annotations

import random

import numpy as np
import pytest

pytest.importorskip("mlx", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.rewinding import Rewind
from cluster.types import SequenceId
from node.engines.mlx.cache import KvCache
from node.engines.mlx.lane import KvShape, Span, StateShape
from node.engines.mlx.positions import LayerCache, LayerKind, Positions, StateCache, owned

WINDOW = 8
KINDS = (LayerKind(), LayerKind(window=WINDOW), LayerKind(states=1))
FULL = KvShape(2, 3, 4, mx.float32)
SHAPES = {
    "full": ((FULL,), KINDS[:1], Rewind()),
    "window": ((FULL, KvShape(1, 2, 2, mx.float32, WINDOW)), KINDS[:2], Rewind(window=WINDOW)),
    "state": ((FULL, StateShape((((2,), mx.float32),))), (KINDS[0], KINDS[2]), Rewind(every=256)),
}
CONTEXT = 200


class Written:
    """A cache, and what was written for each sequence: a number for each position."""

    def __init__(self, kind: str, kv_tokens: int) -> None:
        shapes, self.kinds, rewind = SHAPES[kind]
        self.cache = KvCache(shapes, kv_tokens=kv_tokens, context_tokens=CONTEXT, padding_bytes_max=2000, rewind=rewind)
        self.numbers: dict[SequenceId, list[float]] = {}
        self.next = 1.0

    def step(self, wanted: dict[SequenceId, int]) -> None:
        spans = self.cache.spans_for(wanted)
        assert sorted(seq for span in spans for _, seq in span.seated) == sorted(wanted)
        assert len({id(span.lane) for span in spans}) == len(spans), "two forwards would write into one lane"
        for span in spans:
            tokens = wanted[span.seated[0][1]]
            new = {seq: [self.next + place + 1000 * at for at in range(tokens)] for place, seq in span.seated}
            self.next += 32
            self._forward(span, tokens, new)
            self.cache.commit(span, tokens, self.cache.snapshots(span, tokens))
            for seq, numbers in new.items():
                self.numbers.setdefault(seq, []).extend(numbers)

    def _forward(self, span: Span, tokens: int, new: dict[SequenceId, list[float]]) -> None:
        starts = [self.cache.length(seq) if seq is not None else 0 for seq in span.seqs]
        positions = Positions(starts, tokens, span.lane.capacity, first=span.first, live=span.live)
        given = mx.array([new[seq] if seq is not None else [-7.0] * tokens for seq in span.seqs])
        for layer, kind in enumerate(self.kinds):
            cache = owned(positions, kind, span.lane.stored(layer))
            if isinstance(cache, StateCache):
                cache[0] = cache[0] + given.sum(axis=1, keepdims=True)
            else:
                assert isinstance(cache, LayerCache)
                heads, key_size, value_size = (2, 3, 4) if kind.window is None else (1, 2, 2)
                shaped = mx.broadcast_to(given[:, None, :, None], (len(starts), heads, tokens, key_size))
                valued = mx.broadcast_to(given[:, None, :, None], (len(starts), heads, tokens, value_size))
                cache.update_and_fetch(shaped, valued)
            span.lane.store(layer, *cache.arrays)
        mx.eval(span.lane.arrays)

    def drop(self, seq: SequenceId) -> None:
        self.cache.drop(seq)
        self.numbers.pop(seq, None)

    def cut(self, seq: SequenceId, length: int) -> None:
        kept = self.cache.trim(seq, length)
        self.numbers[seq] = self.numbers[seq][:kept]
        if kept == 0:
            self.drop(seq)

    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> None:
        self.drop(dst)
        if kept := self.cache.fork(src, dst, length):
            self.numbers[dst] = self.numbers[src][:kept]

    def check(self) -> None:
        lanes = {}
        for seq, numbers in self.numbers.items():
            assert self.cache.length(seq) == len(numbers)
            lane = self.cache.lane_of(seq)
            lanes[id(lane)] = lane
            row = lane.rows.index(seq)
            for layer, kind in enumerate(self.kinds):
                arrays = [np.array(array)[row] for array in lane.stored(layer)]
                if kind.states:
                    np.testing.assert_allclose(arrays[0], sum(numbers), rtol=1e-5)
                    continue
                slots = arrays[0].shape[1]
                for position in range(len(numbers))[-(kind.window or CONTEXT) :]:
                    for array in arrays:
                        assert (array[:, position % slots] == numbers[position]).all(), (seq, layer, position)
        assert sum(len(lane.live) for lane in lanes.values()) == len(self.numbers) == len(self.cache)
        rounding = 16 * len(self.numbers)
        assert sum(lane.tokens for lane in lanes.values()) <= self.cache.kv_tokens + rounding


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", SHAPES)
def test_every_sequence_keeps_what_was_written_for_it(kind: str, seed: int) -> None:
    choose = random.Random(seed)
    kv_tokens = choose.choice([400, 800, 2000])
    written = Written(kind, kv_tokens)
    users_max = 2 * (kv_tokens // CONTEXT)
    born = 0
    for _ in range(150):
        there = list(written.numbers)
        match choose.choices(["step", "new", "drop", "fork", "cut"], [12, 3, 1, 1, 1])[0]:
            case "new" if len(there) < users_max and written.cache.used_tokens + 60 < kv_tokens:
                written.step({SequenceId(born): choose.randint(1, 40)})
                born += 1
            case "drop" if there:
                written.drop(choose.choice(there))
            case "fork" if there and len(there) < users_max:
                src = choose.choice(there)
                written.fork(src, SequenceId(born), choose.randint(1, len(written.numbers[src])))
                born += 1
            case "cut" if there:
                seq = choose.choice(there)
                written.cut(seq, choose.randint(0, len(written.numbers[seq])))
            case "step" if there:
                company = choose.sample(there, choose.randint(max(1, len(there) - 2), len(there)))
                wanted = {
                    seq: choose.choice([1] * 8 + [3]) for seq in company if written.cache.length(seq) < CONTEXT - 3
                }
                if wanted and written.cache.used_tokens + sum(wanted.values()) <= kv_tokens:
                    written.step(wanted)
        written.check()
