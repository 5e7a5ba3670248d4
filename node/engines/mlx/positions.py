"""What a layer of `mlx-lm` sees of the KV memory during one step.

Their attention asks a cache for three things: `offset`, the positions at which new tokens begin; `make_mask`; and
`update_and_fetch`, which writes new keys and values and returns all that is to be attended to. With an offset and
a mask for each row, one forward computes sequences of different lengths exactly.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from node.engines.mlx.lane import slots_for


class Layout(enum.Enum):
    """Where attention finds keys and values in a forward."""

    IN_ORDER = enum.auto()  # in the lane, each position in the slot of its number
    ROUND = enum.auto()  # in the lane, every slot, in which new positions have taken the place of old ones
    BESIDE = enum.auto()  # in the lane as it was before, and behind that the new ones: together too many for the slots
    NEW = enum.auto()  # the new ones alone, which are too many for the slots; nothing was there before


class Positions:
    """Where the rows of one forward are: row r's new tokens lie at [starts[r], starts[r] + tokens), in the row
    `first` + r of a lane with room for `capacity` positions. Only what the `live` ones bring is written: all of them,
    if not said otherwise."""

    def __init__(
        self, starts: Sequence[int], tokens: int, capacity: int, *, first: int = 0, live: Sequence[int] | None = None
    ) -> None:
        self.starts = tuple(starts)
        self.tokens = tokens
        self.capacity = capacity
        self.rows = slice(first, first + len(starts))
        self._live = tuple(range(len(starts))) if live is None else tuple(live)
        self._written: dict[tuple[int, int], mx.array] = {}
        self.end = max(starts) + tokens
        self.uniform = len(set(starts)) == 1
        self.offset: int | mx.array = starts[0] if self.uniform else mx.array(self.starts, mx.int32)
        self._masks: dict[tuple[int | None, bool], mx.array] = {}

    def layout(self, window: int | None) -> Layout:
        """Where the new tokens of a layer with this window find what they attend to."""
        slots = slots_for(window, self.capacity)
        if self.end <= slots:
            return Layout.IN_ORDER
        assert window is not None, "a lane has room for every position"
        if self.end == self.tokens:
            return Layout.NEW
        # The first new token has to find all of its window when the last one has been written.
        return Layout.ROUND if self.tokens <= slots - window + 1 else Layout.BESIDE

    def oldest(self, window: int | None) -> int:
        """The first position that any new token of a layer with this window looks at."""
        return 0 if window is None else max(0, min(self.starts) - window + 1)

    def mask(self, window: int | None, as_array: bool, in_chunks: bool = False) -> mx.array | str | None:
        """Which of what is attended to each new token looks at, in the words of MLX's attention."""
        in_order = self.layout(window) in (Layout.IN_ORDER, Layout.NEW)
        oldest = 0 if in_chunks else self.oldest(window)
        everything = window is None or self.end - oldest <= window
        if self.uniform and in_order and everything and not as_array:
            return None if self.tokens == 1 else "causal"
        if (window, in_chunks) not in self._masks:
            self._masks[window, in_chunks] = self._mask(window, in_chunks)
        return self._masks[window, in_chunks]

    def _mask(self, window: int | None, in_chunks: bool) -> mx.array:
        """[rows, 1, tokens, keys], true where the new token may look."""
        queries = self._new()[..., None]
        keys = self._keys(window)[:, :, None]
        mask = keys <= queries
        if in_chunks and window is not None:
            mask = mask & (keys >= queries // window * window)
        return mask if window is None else mask & (keys > queries - window) & (keys >= 0)

    def _keys(self, window: int | None) -> mx.array:
        """[rows or 1, 1, keys]: the position of each; negative where there is none yet."""
        starts = self._starts()
        match self.layout(window):
            case Layout.IN_ORDER | Layout.NEW:
                return mx.arange(self.oldest(window), self.end, dtype=mx.int32).reshape(1, 1, -1)
            case Layout.ROUND:
                return _last_in_slots(starts + self.tokens, slots_for(window, self.capacity))
            case Layout.BESIDE:
                old = _last_in_slots(starts, slots_for(window, self.capacity))
                return mx.concatenate([old, self._new()], axis=-1)

    def _starts(self) -> mx.array:
        return mx.array(self.starts, mx.int32).reshape(-1, 1, 1)

    def _new(self) -> mx.array:
        """[rows, 1, tokens]: the position of each new token."""
        return self._starts() + mx.arange(self.tokens, dtype=mx.int32)

    @property
    def all_live(self) -> bool:
        return len(self._live) == len(self.starts)

    @cached_property
    def live(self) -> mx.array:
        """[rows]: which of them count."""
        return mx.array([place in self._live for place in range(len(self.starts))])

    def of_live(self, new: mx.array) -> mx.array:
        """What the live rows bring."""
        return new if self.all_live else new[mx.array(self._live)]

    def written(self, heads: int, slots: int) -> mx.array:
        """[live rows * heads * tokens]: where in a layer's [rows, heads, slots] new tokens are written; the last ones
        where they are more than slots. Known before anything is computed, and the same for many layers."""
        if (heads, slots) not in self._written:
            live = np.array(self._live)[:, None, None]
            new = np.array(self.starts)[live] + np.arange(self.tokens)[-slots:]
            places = ((self.rows.start + live) * heads + np.arange(heads)[:, None]) * slots + new % slots
            self._written[heads, slots] = mx.array(places.reshape(-1).astype(np.uint32))
        return self._written[heads, slots]


def _last_in_slots(ends: mx.array, slots: int) -> mx.array:
    """[rows, 1, slots]: the last position below `ends` that lies in each slot."""
    slot = mx.arange(slots, dtype=mx.int32)
    return ends - 1 - (ends - 1 - slot) % slots


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a layer remembers: keys and values, looked at within a window or in full, or a state of some arrays, or
    nothing where it looks at the keys and values of another layer. In chunks, the window begins anew every so many
    positions."""

    window: int | None = None
    states: int = 0
    shares: bool = False
    in_chunks: bool = False


class UnownedCache:
    """The cache of a layer that the stage does not own. Models build masks from some layer's cache before their
    loop, and that layer may be elsewhere; a mask needs positions only, so this answers as an owned one would."""

    def __init__(self, positions: Positions, window: int | None, in_chunks: bool = False) -> None:
        self._positions = positions
        self._window = window
        self._in_chunks = in_chunks

    @property
    def offset(self) -> int | mx.array:
        return self._positions.offset

    def make_mask(
        self, tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        assert self._positions.tokens == tokens
        if window_size is not None and window_size != self._window:
            raise ValueError(f"a layer that keeps a window of {self._window} is asked for one of {window_size}")
        return self._positions.mask(self._window, return_array, self._in_chunks)


class LayerCache(UnownedCache):
    """An owned layer's cache. It changes copies of the handles: until the step is committed, the KV memory holds
    what it held before. Once it is, nothing else refers to the old arrays, and MLX writes in place."""

    def __init__(
        self, positions: Positions, window: int | None, keys: mx.array, values: mx.array, in_chunks: bool = False
    ) -> None:
        super().__init__(positions, window, in_chunks)
        self.keys = mx.array(keys)
        self.values = mx.array(values)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.keys, self.values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, tokens, size] at the rows' positions; returns what is to be attended to."""
        positions = self._positions
        rows, layout = positions.rows, positions.layout(self._window)
        if layout is Layout.BESIDE:
            visible_keys, visible_values = (
                mx.concatenate(pair, axis=2) for pair in ([self.keys[rows], keys], [self.values[rows], values])
            )
        self.keys = self._written(self.keys, keys)
        self.values = self._written(self.values, values)
        match layout:
            case Layout.IN_ORDER:
                visible = slice(positions.oldest(self._window), positions.end)
                return self.keys[rows, :, visible], self.values[rows, :, visible]
            case Layout.ROUND:
                return self.keys[rows], self.values[rows]
            case Layout.BESIDE:
                return visible_keys, visible_values
            case Layout.NEW:
                return keys, values

    def _written(self, store: mx.array, new: mx.array) -> mx.array:
        positions = self._positions
        _, heads, slots, size = store.shape
        start = positions.starts[0] % slots
        if positions.uniform and positions.all_live and start + positions.tokens <= slots:
            store[positions.rows, :, start : start + positions.tokens] = new
            return store
        flat = store.reshape(-1, size)
        flat[positions.written(heads, slots)] = positions.of_live(new)[:, :, -slots:].reshape(-1, size)
        return flat.reshape(store.shape)


class StateCache:
    """A layer's cache that is a state of fixed size: the rows of a forward bring equally many tokens, so their states
    need no masks. Owned or not: arrays that nobody asks for are never computed."""

    lengths = None
    left_padding = None

    def __init__(self, arrays: Sequence[mx.array | None]) -> None:
        self._arrays = list(arrays)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """Those that there are."""
        return tuple(array for array in self._arrays if array is not None)

    def __getitem__(self, index: int) -> mx.array | None:
        return self._arrays[index]

    def __setitem__(self, index: int, array: mx.array) -> None:
        self._arrays[index] = array

    def make_mask(self, tokens: int) -> None:
        """Every row has every token."""

    def advance(self, tokens: int) -> None:
        """Where a row is does not matter to its state."""


class SeatedStates(StateCache):
    """The same for some rows of a lane."""

    def __init__(self, positions: Positions, stored: Sequence[mx.array]) -> None:
        super().__init__([array[positions.rows] for array in stored])
        self._positions = positions
        self._stored = tuple(stored)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """Of all rows of the lane; where nobody is computed for, as they were."""
        return tuple(self._merged(stored, new) for stored, new in zip(self._stored, super().arrays, strict=True))

    def _merged(self, stored: mx.array, new: mx.array) -> mx.array:
        positions = self._positions
        if not positions.all_live:
            live = positions.live.reshape(-1, *[1] * (new.ndim - 1))
            new = mx.where(live, new, stored[positions.rows])
        if len(positions.starts) == stored.shape[0]:
            return new
        merged = mx.array(stored)
        merged[positions.rows] = new
        return merged


def unowned(positions: Positions, kind: LayerKind) -> UnownedCache | StateCache | None:
    """The cache of a layer of this kind that the stage does not own, or that keeps nothing."""
    if kind.shares:
        return None
    return StateCache([None] * kind.states) if kind.states else UnownedCache(positions, kind.window, kind.in_chunks)


def owned(positions: Positions, kind: LayerKind, stored: Sequence[mx.array]) -> LayerCache | StateCache:
    """The cache of an owned layer, with what the KV memory holds of the forward's rows."""
    if kind.states:
        return SeatedStates(positions, stored)
    keys, values = stored
    return LayerCache(positions, kind.window, keys, values, kind.in_chunks)
