"""One matrix of an AWQ, GPTQ or compressed-tensors checkpoint, in the affine form that stays in memory.

All three quantise a row's inputs in groups as `(q - zero) * scale`. That is `q * scale + bias` with `bias = -zero *
scale`: MLX's affine packing, row by row, the first input in the lowest bits of a word. Nothing is rounded on the way:
words are moved, scales keep their type, and a bias that this type could not hold exactly is float32. Shapes were
checked against the configuration before; values are checked here. Knows nothing of files, names or modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.errors import ModelError
from cluster.models.integer_shapes import AWQ_ORDER, OTHER_ORDER, OTHER_ZEROS
from cluster.quantities import MIB

_TRANSIENT_BYTES = MIB
"""Of a matrix at a time, where codes have to change places: what a core's cache holds."""

_AWQ_ROWS = len(AWQ_ORDER)

_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Affine:
    """A matrix [rows, inputs] as `words * scales + biases`, group by group."""

    words: torch.Tensor  # int32 [rows, inputs * bits / 32]
    scales: torch.Tensor  # [rows, groups]
    biases: torch.Tensor  # [rows, groups]
    inputs: torch.Tensor | None = None  # int32: the input that each packed column belongs to; None in their order


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> Affine:
    """Four bits: qweight [inputs, rows / 8], qzeros [groups, rows / 8] and scales [groups, rows]."""
    inputs, row_words = qweight.shape
    places = torch.tensor([AWQ_ORDER.index(row) for row in range(_AWQ_ROWS)], device=qweight.device)
    words = qweight.new_empty(row_words, _AWQ_ROWS, inputs // _AWQ_ROWS)
    step = max(1, _TRANSIENT_BYTES // (4 * inputs))
    for first in range(0, row_words, step):
        part = qweight[:, first : first + step]
        words[first : first + step] = _turned(part.unflatten(0, (-1, _AWQ_ROWS)))[:, places].permute(2, 1, 0)
    zeros = _values(qzeros, 4).unflatten(1, (-1, _AWQ_ROWS))[..., places].flatten(1)
    scales = scales.T.contiguous()
    return Affine(words.flatten(0, 1), scales, _biases(scales, zeros.T, 4))


def _turned(blocks: torch.Tensor) -> torch.Tensor:
    """[blocks, 8 columns, words of 8 rows] of four-bit codes as [blocks, 8 rows, words of 8 columns].

    A transposed matrix of codes in three steps: the halves that lie across from each other change places, then the
    quarters within the halves, then single codes (Hacker's Delight, 7-3).
    """
    for half, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        pairs = blocks.unflatten(1, (-1, 2, half))
        first, second, shift = pairs[:, :, 0], pairs[:, :, 1], 4 * half
        across = ((first >> shift) ^ second) & mask
        blocks = torch.stack((first ^ (across << shift), second ^ across), dim=2).flatten(1, 3)
    return blocks


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    *,
    bits: int,
    symmetric: bool,
    zeros_are_one_less: bool,
    reordered: bool,
) -> Affine:
    """qweight [inputs * bits / 32, rows], qzeros [groups, rows * bits / 32], scales [groups, rows], g_idx [inputs].

    Files of the first version (`checkpoint_format: gptq`) hold zeros less one. The one is subtracted from whole words
    there, and added to whole words here, so that the carry of a zero that was 0 finds its way back. The zeros of a
    symmetric matrix are half the range; its file holds them nevertheless.
    """
    if zeros_are_one_less:
        qzeros = qzeros + sum(1 << place for place in range(0, _WORD_BITS, bits))
    zeros = _values(qzeros, bits).T
    if symmetric and not bool((zeros == 1 << (bits - 1)).all()):
        raise ModelError(OTHER_ZEROS)
    scales = scales.T.contiguous()
    biases = _biases(scales, None if symmetric else zeros, bits)
    return _ordered(Affine(qweight.T.contiguous(), scales, biases), g_idx, bits, reordered=reordered)


def from_pack_quantized(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    weight_g_idx: torch.Tensor | None,
    *,
    bits: int,
    reordered: bool,
) -> Affine:
    """weight_packed [rows, inputs * bits / 32], weight_scale [rows, groups], weight_g_idx [inputs].

    Integers are signed and stored with half their range added; what is added to both `q` and zero cancels out.
    Zeros are packed along the rows [rows * bits / 32, groups], or none in a symmetric file: half the range then.
    """
    rows, zeros = weight_scale.shape[0], None
    if weight_zero_point is not None:
        zeros = _values(weight_zero_point.T.contiguous(), bits)[:, :rows].T
    biases = _biases(weight_scale, zeros, bits)
    if weight_g_idx is not None and bool((weight_g_idx == -1).all()):
        weight_g_idx = None  # as written for a matrix that was never reordered
    return _ordered(Affine(weight_packed, weight_scale, biases), weight_g_idx, bits, reordered=reordered)


def _biases(scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Without zeros they are half the range: a power of two, so that the biases fit the scales' type. Any other zero
    has up to eight bits of its own, and float32 holds the product."""
    if zeros is None:
        return scales * -(1 << (bits - 1))
    return torch.empty_like(scales, dtype=torch.float32).copy_(zeros).mul_(scales).neg_()


def _ordered(matrix: Affine, groups: torch.Tensor | None, bits: int, *, reordered: bool) -> Affine:
    """The matrix with the columns of each group side by side, given the group of each column (`desc_act`)."""
    count = matrix.scales.shape[1]
    if groups is None:
        return matrix
    width = groups.numel() // count
    in_order = torch.arange(count, dtype=groups.dtype, device=groups.device).repeat_interleave(width)
    if torch.equal(groups, in_order):
        return matrix
    if not reordered:
        raise ModelError(OTHER_ORDER)
    inputs = torch.argsort(groups, stable=True)
    if not torch.equal(groups[inputs], in_order):
        raise ModelError(
            f"expected {width} columns in each of {count} groups, found g_idx from {int(groups.min())} to "
            f"{int(groups.max())} in other numbers; download the model again"
        )
    words = torch.empty_like(matrix.words)
    step = max(1, _TRANSIENT_BYTES // inputs.numel())
    for first in range(0, words.shape[0], step):
        values = _values(matrix.words[first : first + step], bits)
        words[first : first + step] = _packed(values[:, inputs], bits)
    return Affine(words, matrix.scales, matrix.biases, inputs.int())


def _values(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers in words along the last axis, as uint8."""
    codes = words.contiguous().view(torch.uint8)
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_values`."""
    codes = values if bits == 8 else values[..., ::2] | (values[..., 1::2] << 4)
    return codes.contiguous().view(torch.int32)
