"""The CPU's own product with four-bit weights, for matrices in MLX's affine packing.

torch's kernel takes codes in an order of its own and computes `(code - 8) * scale + zero` with both in bfloat16, so
`zero = bias + 8 * scale` is rounded once more than MLX rounds it; weights are never rounded to bfloat16, and sums are
float32. A matrix whose zeros would lose more by that than rounding its weights would is left to the general path.
Knows nothing of files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from node.engines.torch.packed import Affine

_GROUPS = frozenset({32, 64, 128, 256})
_ROWS = 16
"""The kernel's own conditions: columns of a group, and what the number of rows is a multiple of."""

_CHUNK_ELEMENTS = 1 << 16
"""Unpacked at a time while codes are put in order, 256 KiB of int32, so that a load leaves no holes in memory."""

_PROBED_ROWS = 64
"""Rows in which the order of codes repeats, or a multiple of them, on every kind of processor."""


@dataclass(frozen=True, slots=True)
class Int4:
    """A matrix in the kernel's order."""

    codes: torch.Tensor  # uint8 [rows, columns / 2]; which code lies where is the kernel's business
    scaling: torch.Tensor  # bfloat16 [groups, rows, 2]: scales and zeros

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * 2

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that it keeps in memory."""
        return self.codes, self.scaling

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """bfloat16 [..., rows] of bfloat16 [..., columns]."""
        flat = x.reshape(-1, self.columns)
        group = self.columns // self.scaling.shape[0]
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.codes, group, self.scaling)
        return product.view(*x.shape[:-1], self.rows)

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [rows, columns]."""
        order = _order()
        assert order is not None, "only matrices whose order is known are looked up"
        block = 2 * order.stride
        columns = torch.arange(self.columns)
        starts = rows // block * (block * self.columns // 2) + torch.tensor(order.offsets)[rows % block]
        found = self.codes.flatten()[starts[:, None] + order.stride * columns]
        codes = (found >> torch.tensor(order.shifts, dtype=torch.uint8)[rows % block, None]) & 15
        scales, zeros = self.scaling[:, rows].float().unbind(-1)
        grouped = codes.float().unflatten(-1, (self.scaling.shape[0], -1)) - 8
        return (grouped * scales.T[..., None] + zeros.T[..., None]).flatten(-2)


def in_order_of_kernel(matrices: Sequence[Affine], dtype: torch.dtype, *, looked_up: bool) -> list[Int4] | None:
    """The matrices for the kernel, in the memory of their codes; None where the kernel cannot compute all of them, or
    not as exactly as bfloat16 goes. `looked_up`: rows will be asked for as well."""
    if dtype is not torch.bfloat16 or not all(_fits(matrix, looked_up=looked_up) for matrix in matrices):
        return None
    scalings = []
    for matrix in matrices:
        scaling = _scaling(matrix)
        if scaling is None:
            return None
        scalings.append(scaling)
    for matrix in matrices:
        _reorder(matrix)
    return [Int4(matrix.codes, scaling) for matrix, scaling in zip(matrices, scalings, strict=True)]


def _fits(matrix: Affine, *, looked_up: bool) -> bool:
    if matrix.bits != 4 or matrix.codes.device.type != "cpu":
        return False
    order = _order() if looked_up else None
    known = not looked_up or (order is not None and matrix.rows % (2 * order.stride) == 0)
    return known and matrix.columns // matrix.scales.shape[1] in _GROUPS and matrix.rows % _ROWS == 0


def _reorder(matrix: Affine) -> None:
    step = max(1, _CHUNK_ELEMENTS // (matrix.columns * _PROBED_ROWS)) * _PROBED_ROWS
    for first in range(0, matrix.rows, step):
        part = matrix.codes[first : first + step]
        codes = torch.stack((part & 15, part >> 4), dim=-1).flatten(-2).int()
        part.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))


def _scaling(matrix: Affine) -> torch.Tensor | None:
    """Scales and zeros as the kernel takes them; None when they lose too much.

    A zero's error is the same for all columns of its group; where inputs lean to one side it adds up, so it counts as
    often as the group is wide. Rounding a weight to bfloat16 costs up to 1/512 of it, and weights are about as large
    as their zero and four times the scale.
    """
    groups = matrix.scales.shape[1]
    group = matrix.columns // groups
    scaling = torch.empty((groups, matrix.rows, 2), dtype=torch.bfloat16)
    lost = weights = 0.0
    step = max(1, _CHUNK_ELEMENTS // (8 * groups))
    for first in range(0, matrix.rows, step):
        rows = slice(first, first + step)
        scales = matrix.scales[rows].float()
        zeros = matrix.biases[rows].float().add(scales, alpha=8)  # not in place: biases may be float32 already
        part = scaling[:, rows]
        part[..., 0], part[..., 1] = scales.T, zeros.T
        lost += 16 * float((scales - part[..., 0].T).square().sum())
        lost += group * float((zeros - part[..., 1].T).square().sum())
        weights += float(zeros.square().sum() + 16 * scales.square().sum())
    return scaling if lost <= weights / 512**2 else None


@dataclass(frozen=True, slots=True)
class _Order:
    """Where the codes of a block of `2 * stride` rows lie: those of a column in `stride` bytes, column by column."""

    stride: int
    offsets: Sequence[int]  # of the byte that holds a row's code
    shifts: Sequence[int]  # of the code in its byte


@lru_cache
def _order() -> _Order | None:
    """Found out by trying, since it differs between processors; None when it is of another kind altogether."""
    offsets, shifts, strides = [], [], set()
    for row in range(_PROBED_ROWS):
        codes = torch.zeros((_PROBED_ROWS, 2), dtype=torch.int32)
        codes[row] = 15
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()
        places = packed.nonzero().flatten().tolist()
        kinds = {int(packed[place]) for place in places}
        if len(places) != 2 or len(kinds) != 1 or not kinds <= {0x0F, 0xF0}:
            return None
        offsets.append(places[0])
        strides.add(places[1] - places[0])
        shifts.append(4 if kinds == {0xF0} else 0)
    stride = strides.pop()
    if strides or _PROBED_ROWS % (2 * stride):
        return None
    return _Order(stride, tuple(offsets[: 2 * stride]), tuple(shifts[: 2 * stride]))
