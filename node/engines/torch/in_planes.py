"""Putting matrices in MLX's affine packing in the order of the CPU's kernel, while they are loaded.

The kernel's zero stands for the format's bias and is rounded to bfloat16, once more than MLX rounds it. A matrix whose
zeros would lose more by that than rounding its weights would is left to the general path, and so is what the kernel
does not compute. Knows nothing of files or models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from node.engines.torch import int4
from node.engines.torch.packed import Affine, codes_of
from node.engines.torch.planes import PLANES, Plane, Planes, middle_of

_CHUNK_ELEMENTS = 1 << 16
"""Unpacked at a time while codes are put in order, 256 KiB of int32, so that a load leaves no holes in memory."""

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
    for matrix in matrices:
        _reorder(matrix)
    return [Planes(matrix.codes, scaling, matrix.bits) for matrix, scaling in zip(matrices, scalings, strict=True)]


def _fits(matrix: Affine, *, looked_up: bool) -> bool:
    planes = PLANES.get(matrix.bits)
    if planes is None or matrix.codes.device.type != "cpu" or not int4.is_usable():
        return False
    if looked_up or any(plane.pieces > 1 for plane in planes):
        order = int4.order_of_codes()
        if order is None or matrix.rows % (2 * order.stride):
            return False
    return matrix.columns // matrix.scales.shape[1] in int4.GROUPS and matrix.rows % int4.ROWS == 0


def _reorder(matrix: Affine) -> None:
    step = max(1, _CHUNK_ELEMENTS // (matrix.columns * int4.ROWS_IN_ORDER)) * int4.ROWS_IN_ORDER
    planes = PLANES[matrix.bits]
    for first in range(0, matrix.rows, step):
        part = matrix.codes[first : first + step]
        codes = codes_of(part, matrix.bits)
        wide = torch.cat([(codes >> plane.lowest) << (4 - plane.bits) & 15 for plane in planes], dim=1)
        ordered = int4.in_order(wide)
        if any(plane.pieces > 1 for plane in planes):
            ordered = _in_pieces(ordered, planes)
        part.copy_(ordered.view(part.shape))


def _in_pieces(ordered: torch.Tensor, planes: tuple[Plane, ...]) -> torch.Tensor:
    order = int4.order_of_codes()
    assert order is not None, "only matrices whose order is known are in pieces"
    blocks = ordered.view(len(ordered) // (2 * order.stride), len(planes), -1)
    found = []
    for plane, part in zip(planes, blocks.unbind(1), strict=True):
        pieces = part.unflatten(1, (plane.pieces, -1))
        found.append(sum(pieces[:, piece] >> (piece * plane.bits) for piece in range(plane.pieces)))
    return torch.cat(found, dim=1)


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
