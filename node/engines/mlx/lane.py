"""Sequences that compute together: one array [rows, heads, slots, size] of keys and one of values for each layer.

Owns: how a layer's memory is laid out. A layer that sees everything has a slot for each position. One that looks back a
window has no more than it needs: position p lies in slot p modulo their number, so that new positions take the place
of the oldest and nothing ever moves. A state is arrays [rows, ...] without slots. Knows nothing of attention.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from cluster.rewinding import window_tokens_kept
from cluster.types import SequenceId


def slots_for(window: int | None, capacity: int) -> int:
    """Slots of a layer in a lane whose sequences have up to `capacity` positions."""
    return capacity if window is None else min(capacity, window_tokens_kept(window))


@dataclass(frozen=True, slots=True)
class KvShape:
    """One layer's keys and values for one position: [heads, size] each."""

    heads: int
    key_size: int
    value_size: int
    dtype: mx.Dtype
    window: int | None = None

    @property
    def bytes(self) -> int:
        return self.heads * (self.key_size + self.value_size) * int(self.dtype.size)


@dataclass(frozen=True, slots=True)
class StateShape:
    """One layer's state after any number of positions: the shape and type of each array. All zeros at first."""

    arrays: tuple[tuple[tuple[int, ...], mx.Dtype], ...]


LayerShape = KvShape | StateShape

Part = tuple[tuple[mx.array, ...], int, int]
"""Where a row comes from: a layer's arrays of a lane, the row in it, how many positions count."""


States = Mapping[int, tuple[mx.array, ...]]
"""One sequence's, of the layers that have one: arrays [1, ...]."""


class Lane:
    """A sequence that leaves leaves its row empty, for another one."""

    __slots__ = ("arrays", "capacity", "rows")

    def __init__(self, rows: Sequence[SequenceId | None], capacity: int, layer_count: int) -> None:
        self.rows: list[SequenceId | None] = list(rows)
        self.capacity = capacity
        self.arrays: list[tuple[mx.array, ...]] = [()] * layer_count

    def stored(self, layer: int) -> tuple[mx.array, ...]:
        """Keys and values of an owned layer, [rows, heads, slots, size] each, or its state, [rows, ...]."""
        assert self.arrays[layer], "a lane's layers are filled when it is built"
        return self.arrays[layer]

    def store(self, layer: int, *arrays: mx.array) -> None:
        self.arrays[layer] = arrays

    def fill(self, layer: int, shape: LayerShape, parts: Sequence[Part]) -> None:
        """Allocate a layer and copy what each row holds in. Zeros behind positions: what is masked must still be a
        number."""
        match shape:
            case KvShape(heads, key_size, value_size, dtype, window):
                slots = slots_for(window, self.capacity)
                filled = [mx.zeros((len(parts), heads, slots, size), dtype) for size in (key_size, value_size)]
                for place, (old, row, length) in enumerate(parts):
                    count = min(length, slots)  # all of them only where they are as many here as there
                    for new, array in zip(filled, old, strict=bool(old)):
                        new[place, :, :count] = array[row, :, :count]
            case StateShape(arrays):
                filled = [mx.zeros((len(parts), *shape), dtype) for shape, dtype in arrays]
                for place, (old, row, length) in enumerate(parts):
                    for new, array in zip(filled, old if length > 0 else (), strict=False):
                        new[place] = array[row]
        mx.eval(*filled)
        self.store(layer, *filled)

    def take_in(self, layer: int, shape: LayerShape, parts: Mapping[int, Part]) -> None:
        """Copy what each of these rows is to hold into a filled layer, in place. Not computed yet. Whoever lay there
        before may have left what is no number, so all of a row is written."""
        changed = []
        for place, array in enumerate(self.stored(layer)):
            copy = mx.array(array)
            for row, (old, old_row, length) in parts.items():
                if not old or length == 0:
                    copy[row] = 0
                elif isinstance(shape, StateShape):
                    copy[row] = old[place][old_row]
                else:
                    count = min(length, copy.shape[2])
                    copy[row, :, :count] = old[place][old_row, :, :count]
                    copy[row, :, count:] = 0
            changed.append(copy)
        self.store(layer, *changed)

    def copied_state(self, layer: int, row: int) -> tuple[mx.array, ...]:
        """A row's state that outlives the lane. Part of an array would keep all of it in memory."""
        copies = []
        for array in self.stored(layer):
            copy = mx.zeros((1, *array.shape[1:]), array.dtype)
            copy[0] = array[row]
            copies.append(copy)
        return tuple(copies)

    def with_state(self, layer: int, row: int, state: Sequence[mx.array]) -> tuple[mx.array, ...]:
        """The layer's arrays with another state in one row; the lane keeps what it has."""
        changed = []
        for array, kept in zip(self.stored(layer), state, strict=True):
            copy = mx.array(array)
            copy[row] = kept[0]
            changed.append(copy)
        return tuple(changed)

    @property
    def live(self) -> list[SequenceId]:
        return [seq for seq in self.rows if seq is not None]

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.capacity

    @property
    def bytes(self) -> int:
        return sum(int(array.nbytes) for arrays in self.arrays for array in arrays)


@dataclass(frozen=True, slots=True)
class Span:
    """A run of a lane's rows that compute together. Some of them are empty, or of sequences that are not asked for:
    these are computed like the others, for nobody, and nothing is written there."""

    lane: Lane
    first: int
    seqs: tuple[SequenceId | None, ...]  # of each row; None where it is computed for nobody

    @classmethod
    def over(cls, lane: Lane, company: Collection[SequenceId]) -> Span:
        rows = [row for row, seq in enumerate(lane.rows) if seq in company]
        run = lane.rows[rows[0] : rows[-1] + 1]
        return cls(lane, rows[0], tuple(seq if seq in company else None for seq in run))

    @property
    def seated(self) -> list[tuple[int, SequenceId]]:
        """The lane's row of each sequence."""
        return [(self.first + place, seq) for place, seq in enumerate(self.seqs) if seq is not None]

    @property
    def live(self) -> tuple[int, ...]:
        """The places in the run that are computed for a sequence."""
        return tuple(place for place, seq in enumerate(self.seqs) if seq is not None)
