"""What the blocks of GGUF's element types mean: codes with scales and biases, or numbers.

Owns: taking blocks apart, and packing codes as MLX's affine format wants them. A block of 32 values with a scale is a
group of 32 columns there, and so is a sub-block of 32 in the formats that nest them: w = scale * code + bias, exactly.
Only Q6_K has sub-blocks of 16, for which there are no groups; its values become numbers. Everything here is exact in
float32. Knows nothing of files or names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, assert_never

import numpy as np
import numpy.typing as npt

from cluster.models.gguf_types import GgmlType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

GROUP: Final = 32
"""Columns that share a scale and a bias."""

CODE_BITS: Final = {
    GgmlType.Q4_0: 4,
    GgmlType.Q4_1: 4,
    GgmlType.Q5_0: 5,
    GgmlType.Q5_1: 5,
    GgmlType.Q8_0: 8,
    GgmlType.Q4_K: 4,
    GgmlType.Q5_K: 5,
}
"""The types that are affine in groups of 32, and the bits of their codes."""


@dataclass(frozen=True, slots=True)
class Affine:
    """Rows of a matrix: value [r, c] is scales[r, c // 32] * codes[r, c] + biases[r, c // 32]."""

    codes: Bytes  # [rows, columns]
    scales: Floats  # [rows, columns / 32]
    biases: Floats


def affine(kind: GgmlType, rows: Bytes) -> Affine:
    """The `rows` of a matrix, [rows, bytes of a row], stored as one of CODE_BITS."""
    blocks = rows.reshape(rows.shape[0], -1, kind.block_bytes)
    match kind:
        case GgmlType.Q4_0:
            scales = _half(blocks, 0)
            return _grouped(_nibbles(blocks[..., 2:]), scales, -8 * scales)
        case GgmlType.Q4_1:
            return _grouped(_nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2))
        case GgmlType.Q5_0:
            scales = _half(blocks, 0)
            return _grouped(_nibbles(blocks[..., 6:]) | _fifth(blocks[..., 2:6]), scales, -16 * scales)
        case GgmlType.Q5_1:
            codes = _nibbles(blocks[..., 8:]) | _fifth(blocks[..., 4:8])
            return _grouped(codes, _half(blocks, 0), _half(blocks, 2))
        case GgmlType.Q8_0:
            scales = _half(blocks, 0)
            # Signed bytes, counted from the smallest one.
            return _grouped(blocks[..., 2:] ^ np.uint8(0x80), scales, -128 * scales)
        case GgmlType.Q4_K:
            return _grouped(_nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)), *_nested(blocks))
        case GgmlType.Q5_K:
            low = _nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32))
            # Byte i holds the fifth bits of value i of all eight sub-blocks.
            high = (blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
            return _grouped(low.reshape(*blocks.shape[:2], 8, 32) | high << np.uint8(4), *_nested(blocks))
        case GgmlType.F32 | GgmlType.F16 | GgmlType.BF16 | GgmlType.Q6_K | GgmlType.MXFP4:
            raise AssertionError(f"{kind.name} has no codes of its own")
        case _:
            assert_never(kind)


def numbers(kind: GgmlType, rows: Bytes) -> Floats:
    """The values of `rows`, [rows, bytes of a row], stored as none of CODE_BITS."""
    match kind:
        case GgmlType.F32:
            return rows.view("<f4")
        case GgmlType.F16:
            return rows.view("<f2").astype(np.float32)
        case GgmlType.BF16:
            return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
        case GgmlType.Q6_K:
            return _six_bits(rows.reshape(rows.shape[0], -1, kind.block_bytes))
        case _:
            raise AssertionError(f"{kind.name} is kept packed")


def four_bit_floats(rows: Bytes) -> tuple[npt.NDArray[np.uint32], Bytes]:
    """MXFP4 as MLX packs it: the same four-bit floats in their own order, and the exponent that 32 of them share."""
    blocks = rows.reshape(rows.shape[0], -1, GgmlType.MXFP4.block_bytes)
    codes = _nibbles(blocks[..., 1:]).reshape(rows.shape[0], -1)
    return packed(codes, 4), np.ascontiguousarray(blocks[..., 0])


def packed(codes: Bytes, bits: int) -> npt.NDArray[np.uint32]:
    """Codes as MLX packs them: one stream of bits for each row, the lowest first, in words of 32."""
    if bits == 8:
        stream = np.ascontiguousarray(codes)
    elif bits == 4:
        stream = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    else:
        # Eight codes make as many bytes as a code has bits.
        wide = codes.reshape(codes.shape[0], -1, 8).astype("<u8") << np.arange(8, dtype=np.uint64) * np.uint64(bits)
        eight = np.bitwise_or.reduce(wide, axis=-1)
        stream = eight[..., None].view(np.uint8)[..., :bits].reshape(codes.shape[0], -1)
    return np.ascontiguousarray(stream).view("<u4")


def _grouped(codes: Bytes, scales: Floats, biases: Floats) -> Affine:
    rows = codes.shape[0]
    return Affine(codes.reshape(rows, -1), scales.reshape(rows, -1), biases.reshape(rows, -1))


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 that each block holds from byte `at` on, [rows, blocks]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)


def _nibbles(halves: Bytes) -> Bytes:
    """The low halves of all bytes, then the high ones."""
    return np.concatenate([halves & 15, halves >> 4], axis=-1)


def _fifth(words: Bytes) -> Bytes:
    """A bit for each of 32 values, where the fifth bit of a code belongs."""
    return np.unpackbits(np.ascontiguousarray(words), axis=-1, bitorder="little") << np.uint8(4)


def _nested(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and biases of the eight sub-blocks of Q4_K and Q5_K, [rows, blocks, 8].

    Factors and minima have six bits each. The first four of both stand in a byte each, whose upper two bits belong to
    the later four; the last four bytes hold the rest of these, factors low and minima high.
    """
    six = blocks[..., 4:16]
    first, second, rest = six[..., 0:4], six[..., 4:8], six[..., 8:12]
    factors = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=-1)
    return _half(blocks, 0)[..., None] * factors, -(_half(blocks, 2)[..., None] * minima)


def _six_bits(blocks: Bytes) -> Floats:
    """Q6_K: two halves of 128 values. Four low bits of values 0-31 and 64-95 (32-63 and 96-127) share bytes, and two
    high bits of all four quarters share one."""
    shape = blocks.shape[:2]
    low = blocks[..., :128].reshape(*shape, 2, 2, 32)
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
    codes = np.concatenate([low & 15, low >> 4], axis=-2) | high << 4
    factors = blocks[..., 192:208].view(np.int8).astype(np.float32)
    scales = (_half(blocks, 208)[..., None] * factors).reshape(*shape, 16, 1)
    values: Floats = scales * (codes.reshape(*shape, 16, 16).astype(np.float32) - 32)
    return values.reshape(shape[0], -1)
