"""The cache of one stage: keys and values, or the state, of every sequence and owned layer.

Knows nothing of attention. What a step writes counts only once it has succeeded, which makes a failed one harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluster.rewinding import EXACT, Rewind, WaysBack
from cluster.types import SequenceId
from node.engines.torch.layer_kv import LayerKv


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a recurrent layer knows of a sequence's past. Never changed in place, so copies may share it."""

    window: torch.Tensor | None  # the last inputs of a convolution, [1, channels, kernel]
    matrix: torch.Tensor | None  # a gated delta rule's memory, [1, heads, key size, value size]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for tensor in (self.window, self.matrix) if tensor is not None)


States = Mapping[int, LayerState]
"""Of the layers that have one."""

Places = npt.NDArray[np.int64]
"""[layers, 4]: what `LayerKv.place` says of each."""


class SequenceCache:
    """Keys, values and states of one sequence. Positions from `length` on hold nothing that counts."""

    __slots__ = ("_kept", "_places", "_room", "_states", "length", "ways_back")

    def __init__(self, windows: Sequence[int | None], context_tokens: int, rewind: Rewind = EXACT) -> None:
        self.length = 0
        self.ways_back: WaysBack[States] = WaysBack(rewind)
        self._kept = [LayerKv(window, context_tokens) for window in windows]
        self._states: States = {}
        self._places: Places | None = None  # None where something may have moved
        self._room = 0  # positions that every layer has room for, as long as `_places` are known

    def window(self, layer: int) -> int | None:
        """Positions that the layer looks back; None: all."""
        return self._kept[layer].window

    def state(self, layer: int) -> LayerState | None:
        """After the last position that counts; None before the first."""
        return self._states.get(layer)

    def commit(self, length: int, states: States) -> None:
        """From now on the first `length` positions count, after which layers with a state have `states`."""
        self.ways_back.grew(length, states if self.ways_back.wants_snapshot(self.length, length) else None)
        self.length = length
        self._states = states
        if self._places is None:  # else nothing was written but what there was room for
            for kept in self._kept:
                kept.settle(length)

    def places(self, end: int) -> Places:
        """Where each layer's keys and values lie, with room up to `end`, for who writes there without asking. Every
        layer has some already. The same array as long as nothing has moved."""
        if self._places is None or end > self._room:
            for kept in self._kept:
                kept.settle(self.length)  # a step that failed may have left more room than any other needs
                kept.reserve(self.length, end)
            self._places = np.array([kept.place for kept in self._kept], dtype=np.int64)
            self._room = int((self._places[:, 2] + self._places[:, 3]).min())
        return self._places

    def write(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Put [kv heads, new, head size] at positions from `start`; returns what there is up to their end, and the
        position at which it begins."""
        self._places = None
        return self._kept[layer].write(start, keys, values)

    def cut(self, length: int) -> None:
        """Only the first `length` positions count; one of the ways back."""
        self._states = self._states_at(length)
        self.ways_back.cut(length)
        self.length = length

    def copy(self, length: int) -> SequenceCache:
        """The first `length` positions, one of the ways back, as a sequence of its own."""
        twin = SequenceCache((), 0)
        twin.length, twin.ways_back = length, self.ways_back.forked(length)
        twin._kept = [kept.copy(length) for kept in self._kept]
        twin._states = self._states_at(length)
        return twin

    @property
    def allocated_bytes(self) -> int:
        kept = sum(layer.allocated_bytes for layer in self._kept)
        held = (self._states, *self.ways_back.snapshots)
        # The last snapshot may be the state as it is.
        tensors = {id(tensor): tensor for states in held for state in states.values() for tensor in state.tensors}
        return kept + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def _states_at(self, length: int) -> States:
        states = self._states if length == self.length else self.ways_back.snapshot_at(length)
        return {} if states is None else states


class KvCache:
    """The sequences of a stage, and how many positions they may hold together."""

    def __init__(
        self, windows: Sequence[int | None], kv_tokens: int, context_tokens: int, rewind: Rewind = EXACT
    ) -> None:
        self.kv_tokens = kv_tokens
        self.rewind = rewind
        self._windows = windows  # of the owned layers
        self._context_tokens = context_tokens
        self._sequences: dict[SequenceId, SequenceCache] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def used_tokens(self) -> int:
        return sum(sequence.length for sequence in self._sequences.values())

    @property
    def allocated_bytes(self) -> int:
        return sum(sequence.allocated_bytes for sequence in self._sequences.values())

    def length(self, seq: SequenceId) -> int:
        sequence = self._sequences.get(seq)
        return 0 if sequence is None else sequence.length

    def new(self) -> SequenceCache:
        """An empty sequence, which is not remembered."""
        return SequenceCache(self._windows, self._context_tokens, self.rewind)

    def find_or_new(self, seq: SequenceId) -> SequenceCache:
        """The sequence's cache; a new one is remembered only once it is committed."""
        return self._sequences.get(seq) or self.new()

    def commit(self, seq: SequenceId, sequence: SequenceCache, length: int, states: States) -> None:
        """From now on the sequence's first `length` positions count."""
        sequence.commit(length, states)
        self._sequences[seq] = sequence

    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        self._make_way(src, dst)
        source = self._sequences.get(src)
        if source is None:
            return 0
        honoured = source.ways_back.honoured(source.length, min(length, self.kv_tokens - self.used_tokens))
        if honoured > 0:
            self._sequences[dst] = source.copy(honoured)
        return honoured

    def move(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        self._make_way(src, dst)
        source = self._sequences.pop(src, None)
        if source is not None:
            self._sequences[dst] = source
        return self.trim(dst, length)

    def trim(self, seq: SequenceId, length: int) -> int:
        sequence = self._sequences.get(seq)
        honoured = 0 if sequence is None else sequence.ways_back.honoured(sequence.length, length)
        if sequence is None or honoured == 0:
            self.drop(seq)
        else:
            sequence.cut(honoured)
        return honoured

    def drop(self, seq: SequenceId) -> None:
        self._sequences.pop(seq, None)

    def clear(self) -> None:
        self._sequences.clear()

    def _make_way(self, src: SequenceId, dst: SequenceId) -> None:
        if src == dst:
            raise ValueError(f"sequence {src} cannot be forked onto itself")
        self.drop(dst)
