"""Putting matrices in MLX's affine packing in the order of the CPU's kernel, while they are loaded.

The kernel's zero stands for the format's bias and is rounded to bfloat16, once more than MLX rounds it. A matrix whose
zeros would lose more by that than rounding its weights would is left to the general path, and so is what the kernel
does not compute. Knows nothing of files or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from node.engines.torch import int4
from node.engines.torch.packed import Affine, codes_of
from node.engines.torch.planes import PLANES, Planes, middle_of

_CHUNK_ELEMENTS = 1 << 16
"""Unpacked at a time while codes are put in order, 256 KiB of int32, so that a load leaves no holes in memory."""

_COLUMNS_MAX = 1 << 16
"""A block of 64 rows is put in order aside, in up to 4 MiB then. The widest matrices of known models have 53,248."""

_SCALE_MIN = 2.0**-100
"""Planes multiply scales by adding to their exponents, which a zero has none of. No sum notices such a number."""


def in_planes(matrices: Sequence[Affine], dtype: torch.dtype, *, looked_up: bool) -> list[Planes] | None:
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
    order = int4.order_of_codes()
    assert order is not None, "no matrix fits where it is not known"
    for matrix in matrices:
        _reorder(matrix, order)
    return [Planes(matrix.codes, scaling, matrix.bits) for matrix, scaling in zip(matrices, scalings, strict=True)]


def _fits(matrix: Affine, *, looked_up: bool) -> bool:
    planes, order = PLANES.get(matrix.bits), int4.order_of_codes()
    if planes is None or order is None or matrix.codes.device.type != "cpu" or not int4.is_usable():
        return False
    if (looked_up or any(plane.pieces > 1 for plane in planes)) and matrix.rows % (2 * order.stride):
        return False
    if matrix.columns > _COLUMNS_MAX:
        return False
    return matrix.columns // matrix.scales.shape[1] in int4.GROUPS and matrix.rows % int4.ROWS == 0


def _reorder(matrix: Affine, order: int4.Order) -> None:
    """One block of rows after another, some columns at a time: in a block the kernel takes column after column."""
    bits, block = matrix.bits, 2 * order.stride
    for first in range(0, matrix.rows, block):
        part = matrix.codes[first : first + block]
        ordered = torch.zeros(part.numel(), dtype=torch.uint8)
        for begin, end in _spans(matrix.columns, len(part), bits):
            codes, start = codes_of(part[:, begin * bits // 8 : end * bits // 8], bits), 0
            for plane in PLANES[bits]:
                width = matrix.columns // plane.pieces
                piece, column = divmod(begin, width)
                found = int4.in_order((codes >> plane.lowest) << (4 - plane.bits) & 15).flatten()
                place = ordered[start + column * len(part) // 2 :][: found.numel()]
                place |= found >> (piece * plane.bits)
                start += width * len(part) // 2
        part.copy_(ordered.view(part.shape))


def _spans(columns: int, rows: int, bits: int) -> Iterator[tuple[int, int]]:
    """Columns of whole bytes, none of which lie in two pieces."""
    width, step = columns // max(plane.pieces for plane in PLANES[bits]), max(8, _CHUNK_ELEMENTS // rows // 8 * 8)
    for first in range(0, columns, width):
        for begin in range(first, first + width, step):
            yield begin, min(begin + step, first + width)


def _scaling(matrix: Affine) -> torch.Tensor | None:
    """Scales and zeros as the kernel takes them; None when they lose too much.

    A zero's error is the same for all columns of its group; where inputs lean to one side it adds up, so it counts as
    often as the group is wide. Rounding a weight to bfloat16 costs up to 1/512 of it, and weights are about as large as
    their zero and a quarter of the codes' range.
    """
    groups = matrix.scales.shape[1]
    group, spread = matrix.columns // groups, 2 ** (matrix.bits - 2)
    scaling = torch.empty((groups, matrix.rows, 2), dtype=torch.bfloat16)
    lost = weights = 0.0
    step = max(1, _CHUNK_ELEMENTS // (8 * groups))
    for first in range(0, matrix.rows, step):
        rows = slice(first, first + step)
        scales = matrix.scales[rows].float()
        scales = torch.where(scales.abs() < _SCALE_MIN, _SCALE_MIN, scales)  # what is no number stays none
        # Not in place: biases may be float32 already.
        zeros = matrix.biases[rows].float().add(scales, alpha=middle_of(matrix.bits))
        part = scaling[:, rows]
        part[..., 0], part[..., 1] = scales.T, zeros.T
        lost += spread**2 * float((scales - part[..., 0].T).square().sum())
        lost += group * float((zeros - part[..., 1].T).square().sum())
        weights += float(zeros.square().sum() + spread**2 * scales.square().sum())
    return scaling if lost <= weights / 512**2 else None
