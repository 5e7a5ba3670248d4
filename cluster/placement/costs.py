"""What a stage costs: memory and streamed bytes of any range of layers.

Owns: the one formula for memory, once for a single stage and once as tables over all ranges, which the search
reads. What a step needs beside weights and cache is `activations`. Knows nothing of nodes but what computes there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.limits import SEQUENCES_MAX, SEQUENCES_PER_USER, STEP_TOKENS_MAX
from cluster.models.facts import LayerFacts, ModelFacts
from cluster.nodes import NodeFacts
from cluster.placement.activations import activation_bytes
from cluster.rewinding import SNAPSHOT_TOKENS, SNAPSHOTS_MAX
from cluster.types import Backend, LayerRange

Matrix = npt.NDArray[np.int64]
"""[cut where a range begins, cut where it ends]; NEVER where that is no range."""

NEVER: Final = 1 << 62
_LARGEST: Final = (
    1 << 48
)  # of one layer, or of what an end has; keeps sums far below NEVER however large a lying configuration is

KV_AHEAD: Final = 8
"""They let a sequence's cache grow ahead of its tokens, by one part in so many."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """A stage's memory, and the bytes of weights that it reads for each token."""

    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    streamed_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


def stage_cost(
    facts: ModelFacts, layers: LayerRange, backend: Backend, *, context: int, users: int, on_cpu: bool
) -> StageCost:
    """What a stage with `layers` costs when it promises `context` tokens to each of `users` sequences."""
    is_first, is_last = layers.first == 0, layers.last == facts.layer_count
    owned = facts.layers[layers.first : layers.last]
    weight_bytes = sum(min(layer.resident_bytes[backend], _LARGEST) for layer in owned)
    weight_bytes += _ends_bytes(facts, is_first, is_last)
    streamed_bytes = sum(min(layer.streamed_bytes, _LARGEST) for layer in owned)
    streamed_bytes += _last_streamed_bytes(facts) if is_last else 0
    streamed_bytes += _first_streamed_bytes(facts) if is_first else 0
    kv_bytes = sum(min(_kept_bytes(layer, context, users), _LARGEST) for layer in owned)
    workspace_bytes = activation_bytes(facts, backend, is_last, context=context, users=users, on_cpu=on_cpu)
    workspace_bytes = min(workspace_bytes, _LARGEST)
    workspace_bytes += kv_bytes // KV_AHEAD
    workspace_bytes += sum(min(_made_bytes(layer, context, users), _LARGEST) for layer in owned)
    return StageCost(weight_bytes, kv_bytes, workspace_bytes, streamed_bytes)


def sequences_max(facts: ModelFacts, context: int, users: int) -> int:
    """How many sequences may live at once where `context` tokens are promised to each of `users`: any number, as long
    as they cost what their tokens cost."""
    sequences = _sequences(users)
    forgets = any(
        layer.state_bytes or (layer.kv_tokens_max is not None and sequences * layer.kv_tokens_max < context * users)
        for layer in facts.layers
    )
    return sequences if forgets else SEQUENCES_MAX


def _sequences(users: int) -> int:
    """Live sequences for which memory is promised where each has a cost of its own."""
    return min(SEQUENCES_MAX, SEQUENCES_PER_USER * users)


def _kept_bytes(layer: LayerFacts, context: int, users: int) -> int:
    """Of all sequences in one layer, at the worst: as many as there may be, as long together as was promised. A state
    is there once for now, and once for each snapshot."""
    sequences, tokens = _sequences(users), context * users
    states = sequences + min(sequences * SNAPSHOTS_MAX, tokens // SNAPSHOT_TOKENS)
    if layer.kv_tokens_max is not None:
        tokens = min(tokens, sequences * layer.kv_tokens_max)
    return layer.kv_bytes_per_token * tokens + layer.state_bytes * states


def _made_bytes(layer: LayerFacts, context: int, users: int) -> int:
    """What a step makes in one layer beside what is kept: the next states, and new positions that a window will have
    left behind at the end of the step."""
    made = layer.state_bytes * _sequences(users)
    if layer.kv_tokens_max is not None and layer.kv_tokens_max < context:
        made += layer.kv_bytes_per_token * min(STEP_TOKENS_MAX, context * users)
    return made


def _ends_bytes(facts: ModelFacts, is_first: bool, is_last: bool) -> int:
    """Embedding, norm and head where they are resident. A tied head on the first stage is the embedding itself."""
    total = facts.embedding_bytes + facts.inputs_bytes if is_first else 0
    if is_last:
        total += facts.norm_bytes + (0 if facts.tied and is_first else facts.head_bytes)
    return min(total, _LARGEST)


def _last_streamed_bytes(facts: ModelFacts) -> int:
    """What the last stage reads for each token beside its layers."""
    return min(facts.norm_bytes + facts.head_bytes, _LARGEST)


def _first_streamed_bytes(facts: ModelFacts) -> int:
    """What the first stage reads for each token beside its layers."""
    return min(facts.inputs_streamed_bytes, _LARGEST)


class CostTable:
    """Memory and streamed bytes of every range between two cuts, for one promise."""

    def __init__(self, facts: ModelFacts, *, context: int, users: int) -> None:
        self.facts, self.context, self.users = facts, context, users
        self.cuts = (*sorted(facts.legal_cuts | {0}), facts.layer_count)
        self._memory: dict[tuple[Backend, bool], Matrix] = {}

    @property
    def groups(self) -> int:
        """The most stages that the model can have."""
        return len(self.cuts) - 1

    @cached_property
    def stage_base_bytes(self) -> int:
        """What each stage needs at least, however few layers it has and whatever computes it."""
        return min(self._base_bytes(backend, on_cpu, False) for backend in Backend for on_cpu in (True, False))

    def _base_bytes(self, backend: Backend, on_cpu: bool, is_last: bool) -> int:
        found = activation_bytes(self.facts, backend, is_last, context=self.context, users=self.users, on_cpu=on_cpu)
        return min(found, _LARGEST)

    def range_of(self, begin: int, end: int) -> LayerRange:
        """The layers between two cuts, given by their indexes."""
        return LayerRange(self.cuts[begin], self.cuts[end])

    def memory_on(self, node: NodeFacts) -> Matrix:
        """Memory of every range on `node`."""
        return self.memory(node.backend, node.on_cpu)

    def memory(self, backend: Backend, on_cpu: bool) -> Matrix:
        """Memory of every range on `backend`."""
        if (backend, on_cpu) not in self._memory:
            weights = self._spans([layer.resident_bytes[backend] for layer in self.facts.layers])
            weights[0, :] += _ends_bytes(self.facts, True, False)
            weights[:, -1] += _ends_bytes(self.facts, False, True)
            weights[0, -1] += _ends_bytes(self.facts, True, True) - (
                _ends_bytes(self.facts, True, False) + _ends_bytes(self.facts, False, True)
            )
            kv = self._spans([_kept_bytes(layer, self.context, self.users) for layer in self.facts.layers])
            made = self._spans([_made_bytes(layer, self.context, self.users) for layer in self.facts.layers])
            total = weights + kv + kv // KV_AHEAD + made + self._base_bytes(backend, on_cpu, False)
            total[:, -1] += self._base_bytes(backend, on_cpu, True) - self._base_bytes(backend, on_cpu, False)
            self._memory[backend, on_cpu] = self._ranges_only(total)
        return self._memory[backend, on_cpu]

    @cached_property
    def streamed(self) -> Matrix:
        """Bytes of weights read for each token, of every range."""
        total = self._spans([layer.streamed_bytes for layer in self.facts.layers])
        total[:, -1] += _last_streamed_bytes(self.facts)
        total[0, :] += _first_streamed_bytes(self.facts)
        return self._ranges_only(total)

    def _spans(self, of_layers: list[int]) -> Matrix:
        """Sums over the layers between any two cuts."""
        sums = np.zeros(len(of_layers) + 1, dtype=np.int64)
        np.cumsum([min(value, _LARGEST) for value in of_layers], out=sums[1:])
        at_cuts = sums[list(self.cuts)]
        return at_cuts[None, :] - at_cuts[:, None]

    def _ranges_only(self, matrix: Matrix) -> Matrix:
        index = np.arange(len(self.cuts))
        return np.where(index[:, None] < index[None, :], matrix, NEVER)
