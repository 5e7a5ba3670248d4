"""Matrices of AWQ, GPTQ and compressed-tensors checkpoints, lazily, in the affine form that MLX computes with.

All three quantise a row's inputs in groups as `(q - zero) * scale`, which is `q * scale + bias` with `bias = -zero *
scale`. Bits are moved and nothing is rounded: where the type that the model computes in cannot hold scales and biases
exactly they are float32, and `node.engines.mlx.exact` multiplies with them. Shapes were checked before. Knows nothing
of files, names or modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from cluster.errors import ModelError
from cluster.models.integer_shapes import AWQ_ORDER, MLX_GROUPS, OTHER_ORDER, OTHER_ZEROS
from cluster.quantities import MIB

_AWQ_ROWS = len(AWQ_ORDER)

_PART_BYTES = 4 * MIB
"""Of a matrix whose codes have to change places."""

_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Doubt:
    """Something that was taken for granted, to be looked at when the bytes are there."""

    holds: mx.array  # one bool
    message: str


@dataclass(frozen=True, slots=True)
class Affine:
    """A matrix [rows, inputs] as `words * scales + biases`, group by group; `inputs` is the input that each packed
    column belongs to, None in their order."""

    words: mx.array  # uint32 [rows, inputs * bits / 32]
    scales: mx.array  # [rows, groups]
    biases: mx.array  # [rows, groups]
    inputs: mx.array | None = None
    doubts: tuple[Doubt, ...] = ()


def from_awq(qweight: mx.array, qzeros: mx.array, scales: mx.array, *, dtype: mx.Dtype) -> Affine:
    """Four bits: qweight [inputs, rows / 8], qzeros [groups, rows / 8] and scales [groups, rows]."""
    inputs = qweight.shape[0]
    blocks = qweight.view(mx.uint32).reshape(inputs // _AWQ_ROWS, _AWQ_ROWS, -1)
    places = mx.array([AWQ_ORDER.index(row) for row in range(_AWQ_ROWS)])
    parts = [
        _turned(blocks[..., first:last]).transpose(2, 1, 0)[:, places].reshape(-1, inputs // _AWQ_ROWS)
        for first, last in _cuts(blocks.shape[2], 4 * inputs)
    ]
    words = mx.concatenate(parts)
    zeros = _values(qzeros, 4).reshape(*qzeros.shape, _AWQ_ROWS)[..., places].reshape(qzeros.shape[0], -1)
    return _affine(words, scales.T, zeros.T, bits=4, dtype=dtype)


def _turned(blocks: mx.array) -> mx.array:
    """[blocks, 8 columns, words of 8 rows] of four-bit codes as [blocks, 8 rows, words of 8 columns].

    A transposed matrix of codes in three steps: the halves that lie across from each other change places, then the
    quarters within the halves, then single codes (Hacker's Delight, 7-3).
    """
    count, columns, words = blocks.shape
    for half, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        pairs = blocks.reshape(count, -1, 2, half, words)
        first, second, shift = pairs[:, :, 0], pairs[:, :, 1], 4 * half
        across = ((first >> shift) ^ second) & mask
        blocks = mx.stack([first ^ (across << shift), second ^ across], axis=2).reshape(count, columns, words)
    return blocks


def from_gptq(
    qweight: mx.array,
    qzeros: mx.array,
    scales: mx.array,
    g_idx: mx.array | None,
    *,
    bits: int,
    symmetric: bool,
    zeros_are_one_less: bool,
    reordered: bool,
    dtype: mx.Dtype,
) -> Affine:
    """qweight [inputs * bits / 32, rows], qzeros [groups, rows * bits / 32], scales [groups, rows], g_idx [inputs].

    Files of the first version (`checkpoint_format: gptq`) hold zeros less one. The one is subtracted from whole words
    there, and added to whole words here, so that the carry of a zero that was 0 finds its way back. The zeros of a
    symmetric matrix are half the range; its file holds them nevertheless.
    """
    qzeros = qzeros.view(mx.uint32)
    if zeros_are_one_less:
        qzeros = qzeros + mx.array(sum(1 << place for place in range(0, _WORD_BITS, bits)), mx.uint32)
    zeros = None if symmetric else _values(qzeros, bits).T
    matrix = _affine(qweight.view(mx.uint32).T, scales.T, zeros, bits=bits, dtype=dtype)
    if symmetric:
        halves = sum(1 << place for place in range(bits - 1, _WORD_BITS, bits))
        matrix = replace(matrix, doubts=(Doubt(mx.all(qzeros == mx.array(halves, mx.uint32)), OTHER_ZEROS),))
    return matrix if g_idx is None else _ordered(matrix, g_idx, scales.shape[0], bits, reordered=reordered)


def from_pack_quantized(
    weight_packed: mx.array,
    weight_scale: mx.array,
    weight_zero_point: mx.array | None,
    weight_g_idx: mx.array | None,
    *,
    bits: int,
    reordered: bool,
    dtype: mx.Dtype,
) -> Affine:
    """weight_packed [rows, inputs * bits / 32], weight_scale [rows, groups], weight_g_idx [inputs].

    Integers are signed and stored with half their range added; what is added to both `q` and zero cancels out.
    Zeros are packed along the rows [rows * bits / 32, groups], or none in a symmetric file: half the range then.
    """
    zeros = None
    if weight_zero_point is not None:
        zeros = _values(weight_zero_point.T, bits)[:, : weight_scale.shape[0]].T
    matrix = _affine(weight_packed.view(mx.uint32), weight_scale, zeros, bits=bits, dtype=dtype)
    if weight_g_idx is None:
        return matrix
    return _ordered(matrix, weight_g_idx, weight_scale.shape[1], bits, reordered=reordered)


def _affine(words: mx.array, scales: mx.array, zeros: mx.array | None, *, bits: int, dtype: mx.Dtype) -> Affine:
    """Without zeros they are half the range: a power of two, so that the biases fit the scales' type."""
    if zeros is None and scales.dtype == dtype:
        biases = scales * -(1 << (bits - 1))
    else:
        scales = scales.astype(mx.float32)
        biases = -scales * (1 << (bits - 1) if zeros is None else zeros)
    columns = words.shape[1] * _WORD_BITS // bits
    repeats = _repeats(columns // scales.shape[1])
    # A transposed view would be copied for every product.
    scales, biases = (mx.contiguous(mx.repeat(part, repeats, axis=1)) for part in (scales, biases))
    return Affine(mx.contiguous(words), scales, biases)


def _repeats(width: int) -> int:
    """How many of MLX's groups a group of `width` columns makes."""
    for allowed in MLX_GROUPS:
        if width % allowed == 0:
            return width // allowed
    raise ModelError(f"MLX computes with groups of 32 columns and multiples of it; these have {width}")


def _ordered(matrix: Affine, g_idx: mx.array, count: int, bits: int, *, reordered: bool) -> Affine:
    """The matrix with the columns of each group side by side, given the group of each column."""
    width = g_idx.size // count
    in_order = mx.repeat(mx.arange(count, dtype=g_idx.dtype), width)
    # As compressed-tensors writes it for a matrix whose columns stayed where they were.
    groups = mx.where(mx.all(g_idx == -1), in_order, g_idx)
    if not reordered:
        return replace(matrix, doubts=(*matrix.doubts, Doubt(mx.array_equal(groups, in_order), OTHER_ORDER)))
    inputs = mx.argsort(groups)
    bounds = _cuts(matrix.words.shape[0], 4 * matrix.words.shape[1])
    parts = [_packed(_values(matrix.words[first:last], bits)[:, inputs], bits) for first, last in bounds]
    words = mx.concatenate(parts)
    message = f"expected {width} columns in each of {count} groups, found g_idx with other numbers; download it again"
    doubt = Doubt(mx.array_equal(groups[inputs], in_order), message)
    return replace(matrix, words=words, inputs=inputs, doubts=(*matrix.doubts, doubt))


def _cuts(count: int, size_bytes: int) -> list[tuple[int, int]]:
    """Parts of so many rows of so many bytes. MLX computes one part or a few at a time, so the whole is never there
    several times over; parts are no smaller than they must be, since each is a dozen nodes of a graph."""
    step = max(1, _PART_BYTES // size_bytes)
    return [(first, min(count, first + step)) for first in range(0, count, step)]


def _values(words: mx.array, bits: int) -> mx.array:
    """The integers in words along the last axis, as uint8."""
    codes = mx.contiguous(words).view(mx.uint8)
    return codes if bits == 8 else mx.stack([codes & 15, codes >> 4], axis=-1).flatten(-2)


def _packed(values: mx.array, bits: int) -> mx.array:
    """The inverse of `_values`."""
    codes = values if bits == 8 else values[..., ::2] | (values[..., 1::2] << 4)
    return mx.contiguous(codes).view(mx.uint32)
