"""Keys and values of one sequence in one layer: all of its positions, or the last ones where the layer looks back a
window.

Tensors are [kv heads, capacity, head size], so that attention reads them in place. They grow by an eighth: a decode
step copies nothing, and at most that much memory is allocated above what is used. Behind a window, old positions are
moved out once the tensors are as large as they may become. What a step writes lies behind the positions that count, and
none of those is moved out that the same step would need if it were computed again, which makes a failed one harmless.
"""

from __future__ import annotations

import torch

from cluster.errors import ModelError
from cluster.rewinding import window_tokens_kept, window_tokens_max


class LayerKv:
    """Positions [first, first + capacity), as far as they have been written."""

    __slots__ = ("_capacity", "_first", "_keys", "_tokens_max", "_values", "allocated_bytes", "window")

    def __init__(self, window: int | None, context_tokens: int) -> None:
        self.window = window
        self._tokens_max = context_tokens if window is None else min(context_tokens, window_tokens_max(window))
        self.allocated_bytes = 0  # asked for after every step, so it is known beforehand
        self._first = 0
        self._capacity = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Put [kv heads, new, head size] at positions from `start`; returns what is there up to their end, and the
        position at which it begins."""
        if self._keys is None or self._values is None:
            self._keys, self._values = keys[:, :0], values[:, :0]
        end = start + keys.shape[1]
        self.reserve(start, end)
        begin, stop = start - self._first, end - self._first
        self._keys.narrow(1, begin, stop - begin).copy_(keys)
        self._values.narrow(1, begin, stop - begin).copy_(values)
        return self._keys.narrow(1, 0, stop), self._values.narrow(1, 0, stop), self._first

    def reserve(self, length: int, end: int) -> None:
        """Make room up to `end`, and keep what is still needed of the first `length` positions."""
        if end - self._first > self._capacity:
            self._move(length, end)

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where it lies, for who reads and writes in place: addresses of keys and values, which stay until it moves,
        how many positions there is room for, and the first of them."""
        if self._keys is None or self._values is None:
            raise ModelError("a layer keeps no keys and values of its own")
        return self._keys.data_ptr(), self._values.data_ptr(), self._capacity, self._first

    def settle(self, length: int) -> None:
        """The step has succeeded: give back what only a long one needed."""
        if self._capacity > self._tokens_max:
            self._move(length, length)

    def copy(self, length: int) -> LayerKv:
        """The first `length` positions, as far as they are here."""
        twin = LayerKv(self.window, 0)
        twin._tokens_max, twin._first = self._tokens_max, self._first
        if self._keys is not None and self._values is not None:
            count = length - self._first
            twin.write(self._first, self._keys[:, :count], self._values[:, :count])
        return twin

    def _move(self, length: int, end: int) -> None:
        """To tensors with room up to `end`, with what is still needed of the first `length` positions."""
        assert self._keys is not None and self._values is not None
        first = self._first
        if self.window is not None:
            first = max(first, length - window_tokens_kept(self.window) + 1)
        needed = end - first
        # An eighth also of short sequences: they may be many, and plans leave no more room for growing than that.
        capacity = max(needed, min(needed + needed // 8, self._tokens_max))
        old = slice(first - self._first, length - self._first)
        self._keys, self._values = _moved(self._keys, old, capacity), _moved(self._values, old, capacity)
        self._first, self._capacity = first, capacity
        self.allocated_bytes = self._keys.nbytes + self._values.nbytes


def _moved(tensor: torch.Tensor, old: slice, capacity: int) -> torch.Tensor:
    heads, _, size = tensor.shape
    new = torch.empty((heads, capacity, size), dtype=tensor.dtype, device=tensor.device)
    new[:, : old.stop - old.start] = tensor[:, old]
    return new
