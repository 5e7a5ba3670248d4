"""Llama 4's own: attention within chunks, and queries that grow with their position.

mlx-lm masks chunks for one row, from the first layer's cache, counts a query's position within one row, and norms
queries and keys with a constant of its own. Its projections and rotations are used as they are; what comes between
follows `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from cluster.errors import ModelError

_PERIOD = 4  # of layers that see everything and rotate nothing


def refuse_irregular(config: Mapping[str, object], layer_count: int, where: str) -> None:
    """mlx-lm goes by a layer's number, whatever a list says of it."""
    seeing_all = [(layer + 1) % _PERIOD == 0 for layer in range(layer_count)]
    step = config.get("interleave_moe_layer_step", 1)
    with_experts = list(range(step - 1, layer_count, step)) if isinstance(step, int) and step > 0 else None
    expected: Mapping[str, tuple[object, ...]] = {
        "no_rope_layer_interval": (None, _PERIOD),
        "no_rope_layers": (None, [], [int(not sees) for sees in seeing_all]),
        "layer_types": (None, ["full_attention" if sees else "chunked_attention" for sees in seeing_all]),
        "moe_layers": (None, with_experts),
    }
    for name, known in expected.items():
        if config.get(name) not in known or (name == "moe_layers" and with_experts is None):
            raise ModelError(
                f"{where}: {name} is {config.get(name)!r:.80}; the MLX engine computes layers that see everything only "
                f"at every {_PERIOD}th place, and experts only every interleave_moe_layer_step layers"
            )


class Front:
    """A layer's cache as the model's loop sees it. What the loop makes of it is a mask that nobody computes."""

    start_position = 0
    offset = 0

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def maybe_trim_front(self) -> None:
        """What is no longer needed goes when the step is done."""

    def make_mask(self, *_: object, **__: object) -> None:
        """Layers take that of their own cache."""


class ChunkedAttention(nn.Module):
    """In the place of a layer's attention, with that one's parts."""

    def __init__(self, original: Any, norm_eps: float) -> None:
        super().__init__()
        self.original = original
        self._norm_eps = norm_eps

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        theirs = self.original
        rows, tokens, _ = x.shape

        def heads(projected: mx.array, count: int) -> mx.array:
            return projected.reshape(rows, tokens, count, -1).transpose(0, 2, 1, 3)

        queries = heads(theirs.q_proj(x), theirs.n_heads)
        keys, values = heads(theirs.k_proj(x), theirs.n_kv_heads), heads(theirs.v_proj(x), theirs.n_kv_heads)
        if theirs.use_rope:
            queries, keys = theirs.rope(queries, offset=cache.offset), theirs.rope(keys, offset=cache.offset)
        if theirs.use_qk_norm:
            queries, keys = (mx.fast.rms_norm(each, None, self._norm_eps) for each in (queries, keys))
        if theirs.attn_temperature_tuning and not theirs.use_rope:
            queries = (queries * self._lengths(cache.offset, tokens)).astype(queries.dtype)
        keys, values = cache.update_and_fetch(keys, values)
        output = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=theirs.scale, mask=mask)
        return theirs.o_proj(output.transpose(0, 2, 1, 3).reshape(rows, tokens, -1))

    def _lengths(self, offset: int | mx.array, tokens: int) -> mx.array:
        """[rows or 1, 1, tokens, 1]: how long each query is made."""
        positions = mx.array(offset).reshape(-1, 1, 1, 1) + mx.arange(tokens).reshape(1, 1, -1, 1)
        steps = mx.floor((positions.astype(mx.float32) + 1.0) / self.original.floor_scale)
        return mx.log1p(steps) * self.original.attn_scale + 1.0
