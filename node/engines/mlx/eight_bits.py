"""Matrices of eight-bit floats (E4M3) as the numbers that they stand for: a `Form` of `sources`.

MLX multiplies with no such matrix whose scales are not powers of two, so they are unpacked while they are read: scaled
in float32 and rounded once to the type that the model computes in. Matrices that mlx-lm takes apart are unpacked
lazily. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import mlx.core as mx

from cluster.errors import ModelError
from cluster.limits import UNPACKED_BYTES_MAX
from cluster.models.matrices import Matrix, Role
from node.engines.mlx.sources import Made

_PART_BYTES = UNPACKED_BYTES_MAX // 32
"""Of a matrix's numbers in float32, where it is unpacked lazily. MLX begins some parts before others are done:
together, with their scales and what is rounded, they were 24 times as much, however large the matrix."""

_ScalesOf = Callable[[int, int], mx.array]
"""A scale for each number of some rows, or as few as say the same."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A matrix as numbers of `dtype`."""

    columns: int
    dtype: mx.Dtype
    scales_of: _ScalesOf

    @property
    def made(self) -> tuple[Made, ...]:
        return (Made("weight", self.columns, self.dtype),)

    def convert(self, numbers: mx.array, first: int) -> tuple[mx.array, ...]:
        exact = mx.from_fp8(numbers, dtype=mx.float32) * self.scales_of(first, first + numbers.shape[0])
        return (exact.astype(self.dtype),)


def unpacked(
    parts: Mapping[Role, mx.array], matrix: Matrix, block: tuple[int, int] | None, dtype: mx.Dtype
) -> Unpacked:
    return Unpacked(matrix.shape[-1], dtype, _by_rows(parts[Role.SCALES], matrix, block))


def whole(parts: Mapping[Role, mx.array], form: Unpacked) -> mx.array:
    """The matrix in full precision, lazily: part after part in the memory where it stays. MLX writes into what nobody
    else will read."""
    codes = parts[Role.VALUES]
    rows = codes.flatten(0, -2)
    numbers = mx.zeros(rows.shape, form.dtype)
    step = max(1, _PART_BYTES // max(1, mx.float32.size * rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        last = min(first + step, rows.shape[0])
        (numbers[first:last],) = form.convert(rows[first:last], first)
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
