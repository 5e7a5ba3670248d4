"""What a stage costs: memory and streamed bytes of any range of layers.

Owns: the one formula for memory, once for a single stage and once as tables over all ranges, which the search
reads. Knows nothing of nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.limits import SEQUENCES_MAX, SEQUENCES_PER_USER, STEP_ROWS_MAX, STEP_TOKENS_MAX, UNPACKED_BYTES_MAX
from cluster.models.facts import LayerFacts, ModelFacts
from cluster.rewinding import SNAPSHOT_TOKENS, SNAPSHOTS_MAX
from cluster.types import Backend, LayerRange

Matrix = npt.NDArray[np.int64]
"""[cut where a range begins, cut where it ends]; NEVER where that is no range."""

NEVER: Final = 1 << 62
_LARGEST: Final = 1 << 48  # of one layer; keeps sums far below NEVER however large a lying configuration is

_ATTENTION_QUERIES: Final = 512
"""Engines attend in blocks of so many queries, each with a mask as wide as the context."""

_SCORES: Final = 1 << 23
"""Where scores are written to memory, blocks are as large as this many elements allow, and one query at least."""

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


def stage_cost(facts: ModelFacts, layers: LayerRange, backend: Backend, *, context: int, users: int) -> StageCost:
    """What a stage with `layers` costs when it promises `context` tokens to each of `users` sequences."""
    is_first, is_last = layers.first == 0, layers.last == facts.layer_count
    owned = facts.layers[layers.first : layers.last]
    weight_bytes = sum(min(layer.resident_bytes[backend], _LARGEST) for layer in owned)
    weight_bytes += _ends_bytes(facts, is_first, is_last)
    streamed_bytes = sum(min(layer.streamed_bytes, _LARGEST) for layer in owned)
    streamed_bytes += facts.norm_bytes + facts.head_bytes if is_last else 0
    streamed_bytes += facts.inputs_streamed_bytes if is_first else 0
    kv_bytes = sum(min(_kept_bytes(layer, context, users), _LARGEST) for layer in owned)
    workspace_bytes = activation_bytes(facts, is_last, context=context, users=users) + kv_bytes // KV_AHEAD
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
    return total


def activation_bytes(facts: ModelFacts, is_last: bool, *, context: int, users: int) -> int:
    """Memory that the largest step needs beside weights and cache. What the process itself takes (the interpreter,
    the libraries, a CUDA context) is not in it: nodes leave that out of their budgets.

    Live at once for each token of a step: the residual stream, its copies and the frame that goes out (6 x hidden),
    what else a boundary carries (8 x: 7.3 were measured where it is made, up to 5.2 behind that), queries, keys and
    values before and after rotation (2 x), the MLP's gate, up and product (3 x). No step has more new tokens than the
    cache has room for. Then a block of attention's mask in float32, where scores are written three copies of a block
    of them, and where tokens are drawn the rows' logits and the sampler's copy, all in float32. And a part of a packed
    matrix in full precision.
    """
    tokens = min(STEP_TOKENS_MAX, context * users)
    beside = sum(prod(tensor.shape) for tensor in facts.boundary[1:])
    width = 6 * facts.hidden_size + 8 * beside + 2 * facts.attention_width + 3 * facts.mlp_width
    mask = 4 * min(_ATTENTION_QUERIES, context) * context
    block = facts.scores_heads * min(_ATTENTION_QUERIES, context) * context
    scores = 3 * 4 * min(block, max(_SCORES, facts.scores_heads * context))
    logits = 2 * 4 * min(STEP_ROWS_MAX, tokens) * facts.vocab_size if is_last else 0
    unpacked = UNPACKED_BYTES_MAX if facts.quantization else 0
    return min(tokens * width * facts.dtype.size_bytes + mask + scores + logits + unpacked, _LARGEST)


class CostTable:
    """Memory and streamed bytes of every range between two cuts, for one promise."""

    def __init__(self, facts: ModelFacts, *, context: int, users: int) -> None:
        self.facts, self.context, self.users = facts, context, users
        self.cuts = (*sorted(facts.legal_cuts | {0}), facts.layer_count)
        self._memory: dict[Backend, Matrix] = {}

    @property
    def groups(self) -> int:
        """The most stages that the model can have."""
        return len(self.cuts) - 1

    @property
    def stage_base_bytes(self) -> int:
        """What each stage needs however few layers it has."""
        return activation_bytes(self.facts, False, context=self.context, users=self.users)

    def range_of(self, begin: int, end: int) -> LayerRange:
        """The layers between two cuts, given by their indexes."""
        return LayerRange(self.cuts[begin], self.cuts[end])

    def memory(self, backend: Backend) -> Matrix:
        """Memory of every range on `backend`."""
        if backend not in self._memory:
            weights = self._spans([layer.resident_bytes[backend] for layer in self.facts.layers])
            weights[0, :] += _ends_bytes(self.facts, True, False)
            weights[:, -1] += _ends_bytes(self.facts, False, True)
            weights[0, -1] += _ends_bytes(self.facts, True, True) - (
                _ends_bytes(self.facts, True, False) + _ends_bytes(self.facts, False, True)
            )
            kv = self._spans([_kept_bytes(layer, self.context, self.users) for layer in self.facts.layers])
            made = self._spans([_made_bytes(layer, self.context, self.users) for layer in self.facts.layers])
            total = weights + kv + kv // KV_AHEAD + made + self.stage_base_bytes
            total[:, -1] += (
                activation_bytes(self.facts, True, context=self.context, users=self.users) - self.stage_base_bytes
            )
            self._memory[backend] = self._ranges_only(total)
        return self._memory[backend]

    @cached_property
    def streamed(self) -> Matrix:
        """Bytes of weights read for each token, of every range."""
        total = self._spans([layer.streamed_bytes for layer in self.facts.layers])
        total[:, -1] += self.facts.norm_bytes + self.facts.head_bytes
        total[0, :] += self.facts.inputs_streamed_bytes
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
