"""Matrices of eight-bit floats (E4M3), lazily, as the numbers that they stand for.

MLX multiplies with no such matrix whose scales are not powers of two, so they are unpacked while they are read: scaled
in float32 and rounded once to the type that the model computes in, matrix by matrix. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil

import mlx.core as mx

from cluster.errors import ModelError
from cluster.models.formats import Packing
from cluster.models.layout import canonical_name
from cluster.models.matrices import Matrix, Role


def unpack(
    lazy: Mapping[str, mx.array], matrices: Iterable[Matrix], block: tuple[int, int] | None, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """The tensors of `lazy` with every such matrix in full precision, and without what scaled it."""
    unpacked = dict(lazy)
    for matrix in matrices:
        if matrix.packing is Packing.FP8:
            parts = {role: unpacked.pop(canonical_name(tensor.name)) for role, tensor in matrix.tensors.items()}
            scales = _whole(parts[Role.SCALES], matrix, block)
            numbers = mx.from_fp8(parts[Role.VALUES], dtype=mx.float32) * scales
            unpacked[canonical_name(matrix.name)] = numbers.astype(dtype)
    return unpacked


def _whole(scales: mx.array, matrix: Matrix, block: tuple[int, int] | None) -> mx.array:
    """A scale for each number, or as few as say the same."""
    rows, columns = matrix.shape[-2:]
    wide = scales.astype(mx.float32)
    if scales.size == 1:
        return wide.reshape(1, 1)
    if len(matrix.shape) == 2 and block is None and scales.size == rows:
        return wide.reshape(rows, 1)
    if (
        len(matrix.shape) == 2
        and block is not None
        and scales.shape == (ceil(rows / block[0]), ceil(columns / block[1]))
    ):
        return mx.repeat(mx.repeat(wide, block[0], axis=0)[:rows], block[1], axis=1)[:, :columns]
    raise ModelError(
        f"{matrix.name!r} has shape {matrix.shape}, but its scales have shape {scales.shape}; download the model again"
    )
