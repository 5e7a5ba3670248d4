"""The KV memory of one stage: keys and values, or a state, of every sequence and owned layer.

Sequences that compute together live together, in a lane: one array [rows, heads, capacity, size] a layer. A
step writes into a lane in place and attends to it where it lies, so a decode step copies nothing; sequences move
only when the company changes or a lane is full. A lane is as long as its longest sequence, and that padding is
bounded twice: it may not cost more than reading the weights once more, and lanes together take no more positions
than were promised (but for rounding up). Layers with a window keep all positions too, which makes cutting back
exact. A layer's state is arrays [rows, ...] without positions: a model that has one cannot be cut back. Knows nothing
of attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from cluster.types import SequenceId

_ROUND_TOKENS = 16
_SLACK_TOKENS_MIN = 64


@dataclass(frozen=True, slots=True)
class KvShape:
    """One layer's keys and values for one position: [heads, size] each."""

    heads: int
    key_size: int
    value_size: int
    dtype: mx.Dtype

    @property
    def bytes(self) -> int:
        return self.heads * (self.key_size + self.value_size) * int(self.dtype.size)


@dataclass(frozen=True, slots=True)
class StateShape:
    """One layer's state after any number of positions: the shape and type of each array. All zeros at first."""

    arrays: tuple[tuple[tuple[int, ...], mx.Dtype], ...]


LayerShape = KvShape | StateShape


class Lane:
    """Sequences that compute together. A dropped one leaves its row empty until the lane is next rebuilt."""

    __slots__ = ("arrays", "capacity", "rows")

    def __init__(self, rows: Sequence[SequenceId], capacity: int, layer_count: int) -> None:
        self.rows: list[SequenceId | None] = list(rows)
        self.capacity = capacity
        self.arrays: list[tuple[mx.array, ...]] = [()] * layer_count

    def stored(self, layer: int) -> tuple[mx.array, ...]:
        """Keys and values of an owned layer, [rows, heads, capacity, size] each, or its state, [rows, ...]."""
        assert self.arrays[layer], "a lane's layers are filled when it is built"
        return self.arrays[layer]

    def store(self, layer: int, *arrays: mx.array) -> None:
        self.arrays[layer] = arrays

    @property
    def live(self) -> list[SequenceId]:
        return [seq for seq in self.rows if seq is not None]

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.capacity

    @property
    def bytes(self) -> int:
        return sum(int(array.nbytes) for arrays in self.arrays for array in arrays)


class KvCache:
    """The sequences of a stage, and how many positions they may hold together."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        kv_tokens: int,
        context_tokens: int,
        padding_bytes_max: int,
        rewinds: bool = True,
    ) -> None:
        self.kv_tokens = kv_tokens
        self._shapes = tuple(shapes)
        self._context_tokens = context_tokens
        self._rewinds = rewinds  # False: some stage of the model holds states
        token_bytes = sum(shape.bytes for shape in shapes if isinstance(shape, KvShape))
        self._padding_tokens_max = padding_bytes_max // max(1, token_bytes)
        self._lengths: dict[SequenceId, int] = {}
        self._lanes: dict[SequenceId, Lane] = {}

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def used_tokens(self) -> int:
        return sum(self._lengths.values())

    @property
    def allocated_bytes(self) -> int:
        return sum(lane.bytes for lane in self._all_lanes())

    def length(self, seq: SequenceId) -> int:
        return self._lengths.get(seq, 0)

    def lanes_for(self, wanted: Mapping[SequenceId, int]) -> list[Lane]:
        """Lanes that together hold exactly the wanted sequences, with room for that many more positions of each.
        Sequences that want different numbers are in different lanes. Only `commit` makes the positions count."""
        lanes: list[Lane] = []
        for tokens in dict.fromkeys(wanted.values()):
            for company in self._companies(seq for seq, count in wanted.items() if count == tokens):
                lane = self._lane_for(company, tokens)
                if lane is None:
                    self._spread(wanted)
                    return [self._lanes[seq] for seq in wanted]
                lanes.append(lane)
        return lanes

    def commit(self, lane: Lane, tokens: int) -> None:
        """From now on `tokens` more positions of each of the lane's sequences count."""
        for seq in lane.live:
            self._lengths[seq] = self.length(seq) + tokens

    def forget_uncommitted(self) -> None:
        """Drop rows that were made for sequences which then never came to be."""
        for seq in [seq for seq in self._lanes if seq not in self._lengths]:
            self.drop(seq)

    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        if src == dst:
            raise ValueError(f"sequence {src} cannot be forked onto itself")
        self.drop(dst)
        honoured = max(0, min(length, self.length(src), self.kv_tokens - self.used_tokens))
        if honoured == 0 or not (self._rewinds or honoured == self.length(src)):
            return 0
        if sum(lane.tokens for lane in self._all_lanes()) + _rounded(honoured) > self.kv_tokens:
            self._spread({})
        source = self._lanes[src]
        row = source.rows.index(src)
        twin = Lane([dst], _rounded(honoured), len(self._shapes))
        for layer in range(len(self._shapes)):
            self._fill(twin, layer, [(source.arrays[layer], row, honoured)])
        self._lanes[dst], self._lengths[dst] = twin, honoured
        return honoured

    def trim(self, seq: SequenceId, length: int) -> int:
        # Stages have to agree on what is left, and differ in length after a failed step: so without rewinding nothing
        # is left, even where there is nothing to cut.
        honoured = max(0, min(length, self.length(seq))) if self._rewinds else 0
        if honoured == 0:
            self.drop(seq)
        else:
            self._lengths[seq] = honoured
        return honoured

    def drop(self, seq: SequenceId) -> None:
        self._lengths.pop(seq, None)
        lane = self._lanes.pop(seq, None)
        if lane is not None:
            lane.rows[lane.rows.index(seq)] = None

    def clear(self) -> None:
        self._lengths.clear()
        self._lanes.clear()

    def _all_lanes(self) -> list[Lane]:
        return list({id(lane): lane for lane in self._lanes.values()}.values())

    def _companies(self, seqs: Iterable[SequenceId]) -> list[list[SequenceId]]:
        """Sequences of similar length: padding to the longest costs less than another forward would."""
        companies: list[list[SequenceId]] = []
        padding = 0
        for seq in sorted(seqs, key=self.length):
            if companies:
                padding += len(companies[-1]) * (self.length(seq) - self.length(companies[-1][-1]))
            if companies and padding <= self._padding_tokens_max:
                companies[-1].append(seq)
            else:
                companies.append([seq])
                padding = 0
        return companies

    def _lane_for(self, company: Sequence[SequenceId], tokens: int) -> Lane | None:
        """The company's lane, built anew when it must be; None when the promised memory does not allow it."""
        needed = self.length(company[-1]) + tokens
        lane = self._lanes.get(company[0])
        if lane is not None and needed <= lane.capacity and set(lane.rows) == set(company):
            return lane
        staying = [old for old in self._all_lanes() if not set(old.rows) & set(company)]
        leaving = [seq for old in self._all_lanes() if old not in staying for seq in old.live if seq not in company]
        elsewhere = sum(old.tokens for old in staying) + sum(self._lanes[seq].capacity for seq in leaving)
        slack = max(_SLACK_TOKENS_MIN, needed // 4)
        for capacity in (_rounded(max(needed, min(needed + slack, self._context_tokens))), _rounded(needed)):
            if elsewhere + len(company) * capacity <= self.kv_tokens:
                self._rebuild([(company, capacity)])
                return self._lanes[company[0]]
        return None

    def _spread(self, wanted: Mapping[SequenceId, int]) -> None:
        """Give every sequence a lane of its own, no longer than it must be: the least memory that holds them."""
        needed = {seq: self.length(seq) + wanted.get(seq, 0) for seq in (*self._lengths, *wanted)}
        self._rebuild([([seq], _rounded(length)) for seq, length in needed.items()])

    def _rebuild(self, plan: Sequence[tuple[Sequence[SequenceId], int]]) -> None:
        """Move sequences to new lanes, layer by layer, so that one layer at a time is there twice. Those that
        shared a lane with them and are not in the plan stay together in a smaller one."""
        moving = {seq for company, _ in plan for seq in company}
        old_lanes = list({id(lane): lane for seq in moving if (lane := self._lanes.get(seq)) is not None}.values())
        rest = [(left, lane.capacity) for lane in old_lanes if (left := [s for s in lane.live if s not in moving])]
        new_lanes = [Lane(company, capacity, len(self._shapes)) for company, capacity in (*plan, *rest)]
        origins = {seq: (lane, lane.rows.index(seq)) for lane in old_lanes for seq in lane.live}
        try:
            for layer in range(len(self._shapes)):
                for lane in new_lanes:
                    self._fill(lane, layer, [self._part(origins.get(seq), layer, seq) for seq in lane.live])
                for lane in old_lanes:
                    lane.arrays[layer] = ()
        except BaseException:
            # Half of the layers have moved: what these sequences held is lost, and must not pass for whole.
            for seq in {seq for lane in (*new_lanes, *old_lanes) for seq in lane.live}:
                self.drop(seq)
            raise
        for lane in new_lanes:
            self._lanes |= dict.fromkeys(lane.live, lane)

    def _part(self, origin: tuple[Lane, int] | None, layer: int, seq: SequenceId) -> _Part:
        if origin is None:
            return ((), 0, 0)
        lane, row = origin
        return (lane.arrays[layer], row, self.length(seq))

    def _fill(self, lane: Lane, layer: int, parts: Sequence[_Part]) -> None:
        """Allocate a layer of `lane` and copy what each row holds in. Zeros behind positions: what is masked must
        still be a number."""
        match self._shapes[layer]:
            case KvShape(heads, key_size, value_size, dtype):
                sizes = [(heads, lane.capacity, key_size), (heads, lane.capacity, value_size)]
                filled = [mx.zeros((len(parts), *size), dtype) for size in sizes]
                for place, (old, row, length) in enumerate(parts):
                    for new, array in zip(filled, old, strict=bool(old)):
                        new[place, :, :length] = array[row, :, :length]
            case StateShape(arrays):
                filled = [mx.zeros((len(parts), *shape), dtype) for shape, dtype in arrays]
                for place, (old, row, length) in enumerate(parts):
                    for new, array in zip(filled, old if length > 0 else (), strict=False):
                        new[place] = array[row]
        mx.eval(*filled)
        lane.store(layer, *filled)


_Part = tuple[tuple[mx.array, ...], int, int]
"""Where a row comes from: a layer's arrays of a lane, the row in it, how many positions count."""


def _rounded(tokens: int) -> int:
    return -(-tokens // _ROUND_TOKENS) * _ROUND_TOKENS
