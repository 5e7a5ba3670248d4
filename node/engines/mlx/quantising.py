"""Packing full-precision weights while they are read (`StageSpec.bits`).

A packed matrix is three arrays, and mlx-lm's models stack, split and rename only one: so until they have done that,
a row of it is one run of bytes, its codes, scales and biases one after another. All of it is lazy; reading a tensor
packs it, and MLX evaluates at most some twenty pieces at once, so no more of a stack of experts exist in full.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from cluster.models.family import Family
from cluster.models.quantising import GROUP, is_packed_at_load


def pack_rows(lazy: Mapping[str, mx.array], family: Family, bits: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The same tensors, those that `--bits` packs as rows of bytes [..., outputs, bytes]."""
    return {
        name: _row_bytes(array, bits, dtype)
        if mx.issubdtype(array.dtype, mx.floating) and is_packed_at_load(name, array.shape, family)
        else array
        for name, array in lazy.items()
    }


def unpack_rows(weights: Mapping[str, mx.array], bits: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The rows of bytes as the arrays of MLX's packed layers. No other tensor of a full-precision model is of bytes."""
    arrays: dict[str, mx.array] = {}
    for name, array in weights.items():
        if array.dtype != mx.uint8:
            arrays[name] = array
            continue
        scale_bytes = dtype.size
        groups = array.shape[-1] // (GROUP * bits // 8 + 2 * scale_bytes)
        codes_end = groups * GROUP * bits // 8
        scales_end = codes_end + groups * scale_bytes
        stem = name.removesuffix(".weight")
        arrays[f"{stem}.weight"] = mx.contiguous(array[..., :codes_end]).view(mx.uint32)
        arrays[f"{stem}.scales"] = mx.contiguous(array[..., codes_end:scales_end]).view(dtype)
        arrays[f"{stem}.biases"] = mx.contiguous(array[..., scales_end:]).view(dtype)
    return arrays


def _row_bytes(array: mx.array, bits: int, dtype: mx.Dtype) -> mx.array:
    # On the processor whatever computes later: Metal rounds halves another way, and a layer must have the same numbers
    # on every machine that may hold it. Scales are what float32 makes them, rounded once.
    source = array if array.dtype == dtype else array.astype(mx.float32)
    codes, scales, biases = mx.quantize(source, group_size=GROUP, bits=bits, stream=mx.cpu)
    parts = (codes, scales.astype(dtype), biases.astype(dtype))
    return mx.concatenate([part.view(mx.uint8) for part in parts], axis=-1)
