"""The cache of one stage: keys and values, or the state, of every sequence and owned layer.

A sequence's tensors are [kv heads, capacity, head size], so that attention reads them in place. They grow by
an eighth: a decode step copies nothing, and at most that much memory is allocated above what is used. Knows
nothing of attention; positions are committed only after a step succeeded, which makes a failed one harmless.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cluster.types import SequenceId

_SLACK_TOKENS_MIN = 32


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a recurrent layer knows of a sequence's past. Never changed in place, so copies may share it."""

    window: torch.Tensor | None  # the last inputs of a convolution, [1, channels, kernel]
    matrix: torch.Tensor | None  # a gated delta rule's memory, [1, heads, key size, value size]

    @property
    def size_bytes(self) -> int:
        tensors = [tensor for tensor in (self.window, self.matrix) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class SequenceCache:
    """Keys and values of one sequence. Positions from `length` on hold nothing that counts."""

    __slots__ = ("_capacity", "_context_tokens", "_keys", "_states", "_values", "length")

    def __init__(self, layer_count: int, context_tokens: int) -> None:
        self.length = 0
        self._capacity = 0  # positions that every layer's tensors have, or will have at their next write
        self._context_tokens = context_tokens
        self._keys: list[torch.Tensor | None] = [None] * layer_count
        self._values: list[torch.Tensor | None] = [None] * layer_count
        self._states: dict[int, LayerState] = {}

    def state(self, layer: int) -> LayerState | None:
        """After the last position that counts; None before the first."""
        return self._states.get(layer)

    def commit(self, length: int, states: Mapping[int, LayerState]) -> None:
        """From now on the first `length` positions count, after which layers with a state have `states`."""
        self.length = length
        self._states.update(states)

    def write(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put [kv heads, new, head size] at positions from `start`; returns everything up to their end."""
        end = start + keys.shape[1]
        self._reserve(end)
        all_keys = self._keys[layer] = self._fitted(self._keys[layer], start, keys)
        all_values = self._values[layer] = self._fitted(self._values[layer], start, values)
        all_keys[:, start:end] = keys
        all_values[:, start:end] = values
        return all_keys[:, :end], all_values[:, :end]

    def copy(self, length: int) -> SequenceCache:
        """The first `length` positions as a sequence of its own."""
        twin = SequenceCache(len(self._keys), self._context_tokens)
        twin.commit(length, self._states)
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            if keys is not None and values is not None:
                twin.write(layer, 0, keys[:, :length], values[:, :length])
        return twin

    @property
    def allocated_bytes(self) -> int:
        tensors = [tensor for tensor in (*self._keys, *self._values) if tensor is not None]
        kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return kept + sum(state.size_bytes for state in self._states.values())

    def _reserve(self, needed: int) -> None:
        if needed > self._capacity:
            slack = max(_SLACK_TOKENS_MIN, needed // 8)
            self._capacity = max(needed, min(needed + slack, self._context_tokens))

    def _fitted(self, old: torch.Tensor | None, kept: int, like: torch.Tensor) -> torch.Tensor:
        """`old` if it is large enough, else a larger tensor that begins with its first `kept` positions."""
        if old is not None and old.shape[1] >= self._capacity:
            return old
        new = torch.empty((like.shape[0], self._capacity, like.shape[2]), dtype=like.dtype, device=like.device)
        if old is not None:
            new[:, :kept] = old[:, :kept]
        return new


class KvCache:
    """The sequences of a stage, and how many positions they may hold together."""

    def __init__(self, layer_count: int, kv_tokens: int, context_tokens: int, *, rewinds: bool = True) -> None:
        self.kv_tokens = kv_tokens
        self._rewinds = rewinds  # False: the model has states, which cannot be cut back
        self._layer_count = layer_count
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

    def find_or_new(self, seq: SequenceId) -> SequenceCache:
        """The sequence's cache; a new one is remembered only once it is committed."""
        return self._sequences.get(seq) or SequenceCache(self._layer_count, self._context_tokens)

    def commit(self, seq: SequenceId, sequence: SequenceCache, length: int, states: Mapping[int, LayerState]) -> None:
        """From now on the sequence's first `length` positions count."""
        sequence.commit(length, states)
        self._sequences[seq] = sequence

    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        if src == dst:
            raise ValueError(f"sequence {src} cannot be forked onto itself")
        self.drop(dst)
        room = self.kv_tokens - self.used_tokens
        honoured = max(0, min(length, self.length(src), room))
        if not self._rewinds and honoured != self.length(src):
            return 0
        if honoured > 0:
            self._sequences[dst] = self._sequences[src].copy(honoured)
        return honoured

    def trim(self, seq: SequenceId, length: int) -> int:
        # Stages have to agree on what is left, and after a failed step they differ in length: so without rewinding
        # nothing is left, even where there is nothing to cut.
        honoured = max(0, min(length, self.length(seq))) if self._rewinds else 0
        if honoured == 0:
            self.drop(seq)
        else:
            self._sequences[seq].length = honoured
        return honoured

    def drop(self, seq: SequenceId) -> None:
        self._sequences.pop(seq, None)

    def clear(self) -> None:
        self._sequences.clear()
