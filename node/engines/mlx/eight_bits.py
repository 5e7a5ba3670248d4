"""Matrices of eight-bit floats (E4M3), lazily, as the numbers that they stand for.

MLX multiplies with no such matrix whose scales are not powers of two, so they are unpacked while they are read: scaled
in float32 and rounded once to the type that the model computes in, some rows at a time. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import ceil

import mlx.core as mx

from cluster.errors import ModelError
from cluster.limits import UNPACKED_BYTES_MAX
from cluster.models.formats import Packing
from cluster.models.layout import canonical_name
from cluster.models.matrices import Matrix, Role

_PART_BYTES = UNPACKED_BYTES_MAX // 32
"""Of a matrix's numbers in float32. MLX begins some parts before others are done: together, with their scales and what
is rounded, they were 24 times as much, however large the matrix."""

_ScalesOf = Callable[[int, int], mx.array]
"""A scale for each number of some rows, or as few as say the same."""


def unpack(
    lazy: Mapping[str, mx.array], matrices: Iterable[Matrix], block: tuple[int, int] | None, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """The tensors of `lazy` with every such matrix in full precision, and without what scaled it."""
    unpacked = dict(lazy)
    for matrix in matrices:
        if matrix.packing is Packing.FP8:
            parts = {role: unpacked.pop(canonical_name(tensor.name)) for role, tensor in matrix.tensors.items()}
            scales_of = _by_rows(parts[Role.SCALES], matrix, block)
            unpacked[canonical_name(matrix.name)] = _numbers(parts[Role.VALUES], scales_of, dtype)
    return unpacked


def _numbers(codes: mx.array, scales_of: _ScalesOf, dtype: mx.Dtype) -> mx.array:
    """Part after part in the memory where the matrix stays: MLX writes into what nobody else will read."""
    rows = codes.flatten(0, -2)
    numbers = mx.zeros(rows.shape, dtype)
    step = max(1, _PART_BYTES // max(1, mx.float32.size * rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        last = min(first + step, rows.shape[0])
        exact = mx.from_fp8(rows[first:last], dtype=mx.float32) * scales_of(first, last)
        numbers[first:last] = exact.astype(dtype)
    return numbers.reshape(codes.shape)


def _by_rows(scales: mx.array, matrix: Matrix, block: tuple[int, int] | None) -> _ScalesOf:
    rows, columns = matrix.shape[-2:]
    wide = scales.astype(mx.float32)
    if scales.size == 1:
        one = wide.reshape(1, 1)
        return lambda first, last: one
    if len(matrix.shape) == 2 and block is None and scales.size == rows:
        column = wide.reshape(rows, 1)
        return lambda first, last: column[first:last]
    if (
        len(matrix.shape) == 2
        and block is not None
        and scales.shape == (ceil(rows / block[0]), ceil(columns / block[1]))
    ):
        height, width = block

        def of_blocks(first: int, last: int) -> mx.array:
            above = first // height
            tall = mx.repeat(wide[above : ceil(last / height)], height, axis=0)
            return mx.repeat(tall[first - above * height : last - above * height], width, axis=1)[:, :columns]

        return of_blocks
    raise ModelError(
        f"{matrix.name!r} has shape {matrix.shape}, but its scales have shape {scales.shape}; download the model again"
    )
