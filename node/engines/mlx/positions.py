"""What a layer of `mlx-lm` sees of the KV memory during one step.

Their attention asks a cache for three things: `offset`, the positions at which new tokens begin; `make_mask`; and
`update_and_fetch`, which writes new keys and values and returns all that is to be attended to. With an offset and
a mask for each row, one forward computes sequences of different lengths exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx


class Positions:
    """Where the rows of one forward are: row r's new tokens lie at [starts[r], starts[r] + tokens)."""

    def __init__(self, starts: Sequence[int], tokens: int) -> None:
        self.starts = tuple(starts)
        self.tokens = tokens
        self.end = max(starts) + tokens
        self.uniform = len(set(starts)) == 1
        self.offset: int | mx.array = starts[0] if self.uniform else mx.array(self.starts, mx.int32)
        self._masks: dict[tuple[int | None, int], mx.array] = {}

    def oldest(self, window: int | None) -> int:
        """The first position that any new token of a layer with this window looks at."""
        return 0 if window is None else max(0, min(self.starts) - window + 1)

    def mask(self, window: int | None, oldest: int, as_array: bool) -> mx.array | str | None:
        """Which of the positions [oldest, end) each new token looks at, in the words of MLX's attention."""
        everything = window is None or self.end - oldest <= window
        if self.uniform and everything and not as_array:
            return None if self.tokens == 1 else "causal"
        key = (window, oldest)
        if key not in self._masks:
            self._masks[key] = self._mask(window, oldest)
        return self._masks[key]

    def _mask(self, window: int | None, oldest: int) -> mx.array:
        """[rows, 1, tokens, positions], true where the new token may look."""
        starts = mx.array(self.starts, mx.int32).reshape(-1, 1, 1, 1)
        queries = starts + mx.arange(self.tokens, dtype=mx.int32).reshape(1, 1, -1, 1)
        keys = mx.arange(oldest, self.end, dtype=mx.int32).reshape(1, 1, 1, -1)
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a layer remembers: keys and values, looked at within a window or in full, or a state of some arrays, or
    nothing where it looks at the keys and values of another layer."""

    window: int | None = None
    states: int = 0
    shares: bool = False


class UnownedCache:
    """The cache of a layer that the stage does not own. Models build masks from some layer's cache before their
    loop, and that layer may be elsewhere; a mask needs positions only, so this answers as an owned one would."""

    def __init__(self, positions: Positions, window: int | None) -> None:
        self._positions = positions
        self._window = window
        self._oldest = positions.oldest(window)

    @property
    def offset(self) -> int | mx.array:
        return self._positions.offset

    def make_mask(
        self, tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        assert self._positions.tokens == tokens
        return self._positions.mask(window_size or self._window, self._oldest, return_array)


class LayerCache(UnownedCache):
    """An owned layer's cache. It changes copies of the handles: until the step is committed, the KV memory holds
    what it held before. Once it is, nothing else refers to the old arrays, and MLX writes in place."""

    def __init__(self, positions: Positions, window: int | None, keys: mx.array, values: mx.array) -> None:
        super().__init__(positions, window)
        self.keys = mx.array(keys)
        self.values = mx.array(values)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.keys, self.values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, tokens, size] at the rows' positions; returns the positions [oldest, end) of all rows."""
        self.keys = self._written(self.keys, keys)
        self.values = self._written(self.values, values)
        visible = slice(self._oldest, self._positions.end)
        return self.keys[:, :, visible], self.values[:, :, visible]

    def _written(self, store: mx.array, new: mx.array) -> mx.array:
        positions = self._positions
        if positions.uniform:
            start = positions.starts[0]
            store[:, :, start : start + positions.tokens] = new
            return store
        places = mx.array(positions.starts, mx.int32).reshape(-1, 1, 1, 1)
        places = places + mx.arange(positions.tokens, dtype=mx.int32).reshape(1, 1, -1, 1)
        return mx.put_along_axis(store, mx.broadcast_to(places, new.shape), new, axis=2)


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


def unowned(positions: Positions, kind: LayerKind) -> UnownedCache | StateCache | None:
    """The cache of a layer of this kind that the stage does not own, or that keeps nothing."""
    if kind.shares:
        return None
    return StateCache([None] * kind.states) if kind.states else UnownedCache(positions, kind.window)


def owned(positions: Positions, kind: LayerKind, stored: Sequence[mx.array]) -> LayerCache | StateCache:
    """The cache of an owned layer, with what the KV memory holds of the forward's rows."""
    return StateCache(stored) if kind.states else LayerCache(positions, kind.window, *stored)
