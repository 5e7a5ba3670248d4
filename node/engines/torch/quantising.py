"""Full-precision numbers into MLX's affine packing, to the bit as MLX packs them on a processor.

Owns the arithmetic for rows in host memory. Which tensors are packed is `cluster.models.quantising`, where they go
`weights`.
"""

from __future__ import annotations

import torch

from cluster.models.quantising import GROUP
from cluster.quantities import MIB

CHUNK_ELEMENTS = MIB
"""Numbers that are packed at a time: what they take in float32, several times over, is in no slice's size."""

_SCALE_MIN = 1e-7
"""MLX's: what a group of equal numbers is divided by."""


def pack_rows(values: torch.Tensor, bits: int, codes: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor) -> None:
    """Pack `values` [rows, columns] into `codes` (int32 words [rows, columns x bits / 32], the first number in the
    lowest bits) and into `scales` and `biases` [rows, columns / GROUP], wherever these three are."""
    rows, columns = values.shape
    step = max(1, CHUNK_ELEMENTS // columns)
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        steps, scale, bias = _steps(values[part], bits)
        codes[part].copy_(_words(steps.to(torch.uint8).view(-1, columns), bits))
        scales[part].copy_(scale)
        biases[part].copy_(bias)


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of `values` [rows, columns] after packing, in their own type."""
    steps, scale, bias = _steps(values, bits)
    scale, bias = scale.to(values.dtype).float(), bias.to(values.dtype).float()
    return steps.mul_(scale[..., None]).add_(bias[..., None]).view(values.shape).to(values.dtype)


def _steps(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [rows, groups, GROUP] with a scale and a bias for each group, all in float32."""
    groups = values.float().view(-1, values.shape[-1] // GROUP, GROUP)
    scale, bias = _scale_and_bias(groups, bits)
    steps = (groups - bias[..., None]).div_(scale[..., None]).round_().clamp_(0, (1 << bits) - 1)
    return steps, scale, bias


def _scale_and_bias(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One of each for every group, so that a code times the scale plus the bias is about the number. The end of a
    group's range that is farther from zero is met exactly, and so is zero."""
    low, high = groups.amin(-1), groups.amax(-1)
    is_low = low.abs() > high.abs()
    scale = ((high - low) / ((1 << bits) - 1)).clamp_(min=_SCALE_MIN)
    scale = torch.where(is_low, scale, -scale)
    edge = torch.where(is_low, low, high)
    zero = (edge / scale).round_()  # the code of zero, negated
    is_wide = zero != 0
    return torch.where(is_wide, edge / zero, scale), torch.where(is_wide, edge, 0.0)


def _words(steps: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes with one code each as 32-bit words of codes without gaps."""
    if bits == 4:
        packed = steps[:, 0::2] | steps[:, 1::2] << 4
    elif bits == 6:
        # Four codes are three bytes: 6 + 2, 4 + 4 and 2 + 6 bits.
        first, second, third, fourth = (steps[:, place::4] for place in range(4))
        three = (first | second << 6, second >> 2 | third << 4, third >> 4 | fourth << 2)
        packed = torch.stack(three, dim=-1).flatten(1)
    else:
        packed = steps
    return packed.contiguous().view(torch.int32)
