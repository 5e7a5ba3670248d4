"""Attention in blocks of queries, where MLX would write the scores of a whole chunk to memory.

`mlx-lm` gives a chunk's queries to MLX in one call. MLX's own kernel needs no scores in memory, but it exists on GPUs
alone and for some sizes of heads; elsewhere all heads' scores of the chunk and the whole context are written, several
times: 6 GiB for 2,048 tokens of an 8-billion model within 8,192. A query's result does not depend on the others, so
blocks give the same. The models that score by themselves (Gemma 2, DeepSeek's latents) are beyond this; their plans
count whole chunks. Knows the function that models call, and our caches, by which it tells our forwards from others'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from node.engines.mlx.positions import UnownedCache

_NAME: Final = "scaled_dot_product_attention"
_THEIRS: Final[Callable[..., mx.array]] = base.scaled_dot_product_attention

SCORES_MAX: Final = 1 << 23
"""Scores in one block: some queries (one at least), all heads and rows, the whole context. `placement.activations`
counts with it."""

_FUSED_HEADS: Final = frozenset({64, 80, 128})
"""Sizes for which MLX has a kernel on GPUs that reads many queries."""


def attend_in_blocks(model: nn.Module) -> None:
    """Let the modules that `model` is made of call `attend`."""
    for name in {type(part).__module__ for part in model.modules()}:
        module = sys.modules[name]
        if getattr(module, _NAME, None) is _THEIRS:
            setattr(module, _NAME, attend)


def attend(
    queries: mx.array,  # [rows, heads, tokens, head size]
    keys: mx.array,  # [rows, key heads, positions, head size]
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """What `mlx-lm`'s function of this name gives."""
    rows, heads, tokens, size = queries.shape
    positions = keys.shape[2]
    block = max(1, SCORES_MAX // (rows * heads * positions))
    fused = mx.default_device() != mx.Device(mx.cpu) and size in _FUSED_HEADS
    if not isinstance(cache, UnownedCache) or tokens <= block or fused:
        return _THEIRS(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    parts = []
    for begin in range(0, tokens, block):
        end = min(begin + block, tokens)
        seen, part = positions, mask
        if isinstance(mask, str):  # causal: the last query sees everything, the ones before it one less each
            seen = positions - tokens + end
        elif mask is not None and mask.shape[-2] > 1:
            part = mask[..., begin:end, :]
        parts.append(
            _THEIRS(
                queries[:, :, begin:end],
                keys[:, :, :seen],
                values[:, :, :seen],
                cache=cache,
                scale=scale,
                mask=part,
                sinks=sinks,
            )
        )
    return mx.concatenate(parts, axis=2)
