"""Tensors as GGUF stores them: what a quantiser may write, and what it means.

Independent of the code under test: blocks are packed and unpacked here value by value, as the format describes them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tests.gguf_files import Stored

Floats = npt.NDArray[np.float32]


def stored(values: Floats, kind: str) -> Stored:
    """`values` rounded to what `kind` can hold. The last axis has to divide into its blocks."""
    if kind == "F32":
        return kind, values.shape, values.astype("<f4").tobytes()
    if kind == "F16":
        return kind, values.shape, values.astype("<f2").tobytes()
    if kind == "BF16":
        return kind, values.shape, (_bf16(values).view("<u4") >> 16).astype("<u2").tobytes()
    size, pack, _ = _BLOCKS[kind]
    blocks = values.reshape(-1, size)
    return kind, values.shape, b"".join(pack(block) for block in blocks)


def dequantised(tensor: Stored) -> Floats:
    """What the bytes mean, in float32."""
    kind, shape, data = tensor
    if kind == "F32":
        return np.frombuffer(data, "<f4").reshape(shape).copy()
    if kind == "F16":
        return np.frombuffer(data, "<f2").astype(np.float32).reshape(shape)
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    size, _, unpack = _BLOCKS[kind]
    count = int(np.prod(shape)) // size
    block_bytes = len(data) // count
    blocks = [unpack(data[i * block_bytes : (i + 1) * block_bytes]) for i in range(count)]
    return np.array(blocks, dtype=np.float64).astype(np.float32).reshape(shape)


def _bf16(values: Floats) -> Floats:
    """Rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _half(value: float) -> bytes:
    return struct.pack("<e", value)


def _levels(values: Floats, scale: npt.ArrayLike, low: npt.ArrayLike, top: int) -> list[int]:
    """The nearest whole numbers from 0 to `top` such that scale * number + low is the value. Scales may differ from
    row to row."""
    scales, lows = np.atleast_1d(scale)[:, None], np.atleast_1d(low)[:, None]
    steps = np.rint((np.atleast_2d(values) - lows) / np.where(scales == 0, np.inf, scales))
    levels: list[int] = np.clip(steps, 0, top).astype(int).ravel().tolist()
    return levels


def _pack_signed(bits: int) -> Callable[[Floats], bytes]:
    """Q4_0, Q5_0: one scale, and numbers around the middle."""
    middle = 1 << (bits - 1)

    def pack(block: Floats) -> bytes:
        widest = float(block[np.abs(block).argmax()])
        scale = float(np.float16(-widest / middle))
        return _half(scale) + _digits(_levels(block, scale, -middle * scale, 2 * middle - 1), bits)

    return pack


def _pack_between(bits: int) -> Callable[[Floats], bytes]:
    """Q4_1, Q5_1: a scale and the smallest value."""

    def pack(block: Floats) -> bytes:
        low, high = float(block.min()), float(block.max())
        scale, low = float(np.float16((high - low) / ((1 << bits) - 1))), float(np.float16(low))
        return _half(scale) + _half(low) + _digits(_levels(block, scale, low, (1 << bits) - 1), bits)

    return pack


def _digits(levels: Sequence[int], bits: int) -> bytes:
    """Low halves of all; before them the fifth bits, one for each value."""
    halves = bytes((levels[i] & 15) | (levels[i + 16] & 15) << 4 for i in range(16))
    fifth = sum((level >> 4) << i for i, level in enumerate(levels))
    return (struct.pack("<I", fifth) if bits == 5 else b"") + halves


def _read_digits(data: bytes, bits: int) -> list[int]:
    fifth, halves = (struct.unpack("<I", data[:4])[0], data[4:]) if bits == 5 else (0, data)
    low = [byte & 15 for byte in halves] + [byte >> 4 for byte in halves]
    return [digit | (fifth >> i & 1) << 4 for i, digit in enumerate(low)]


def _unpack_signed(bits: int) -> Callable[[bytes], list[float]]:
    def unpack(data: bytes) -> list[float]:
        (scale,) = struct.unpack("<e", data[:2])
        return [scale * (digit - (1 << (bits - 1))) for digit in _read_digits(data[2:], bits)]

    return unpack


def _unpack_between(bits: int) -> Callable[[bytes], list[float]]:
    def unpack(data: bytes) -> list[float]:
        scale, low = struct.unpack("<ee", data[:4])
        return [scale * digit + low for digit in _read_digits(data[4:], bits)]

    return unpack


def _pack_q8_0(block: Floats) -> bytes:
    scale = float(np.float16(np.abs(block).max() / 127))
    return _half(scale) + struct.pack("32b", *(level - 127 for level in _levels(block, scale, -127 * scale, 254)))


def _unpack_q8_0(data: bytes) -> list[float]:
    scale, *levels = struct.unpack("<e32b", data)
    return [scale * level for level in levels]


def _pack_k(bits: int) -> Callable[[Floats], bytes]:
    """Q4_K, Q5_K: eight groups of 32, their scales and minima in six bits, and a scale for each of these two."""

    def pack(block: Floats) -> bytes:
        groups = block.reshape(8, 32)
        lows = np.minimum(groups.min(axis=1), 0)
        steps = (groups.max(axis=1) - lows) / ((1 << bits) - 1)
        scale, low_scale = float(np.float16(steps.max() / 63)), float(np.float16(-lows.min() / 63))
        factors = _levels(steps, scale, 0.0, 63)
        minima = _levels(-lows, low_scale, 0.0, 63)
        levels = _levels(groups, scale * np.array(factors), -low_scale * np.array(minima), (1 << bits) - 1)
        high = bytes(sum((levels[32 * group + i] >> 4) << group for group in range(8)) for i in range(32))
        low = b"".join(
            bytes((levels[64 * pair + i] & 15) | (levels[64 * pair + 32 + i] & 15) << 4 for i in range(32))
            for pair in range(4)
        )
        return _half(scale) + _half(low_scale) + _six_bits(factors, minima) + (high if bits == 5 else b"") + low

    return pack


def _six_bits(factors: Sequence[int], minima: Sequence[int]) -> bytes:
    """Twelve bytes: four factors and four minima whole, with two bits of a later one above each; then the rest."""
    first = [factors[i] | (factors[i + 4] >> 4) << 6 for i in range(4)]
    second = [minima[i] | (minima[i + 4] >> 4) << 6 for i in range(4)]
    return bytes(first + second + [(factors[i + 4] & 15) | (minima[i + 4] & 15) << 4 for i in range(4)])


def _unpack_k(bits: int) -> Callable[[bytes], list[float]]:
    def unpack(data: bytes) -> list[float]:
        scale, low_scale = struct.unpack("<ee", data[:4])
        six, rest = data[4:16], data[16:]
        high, low = (rest[:32], rest[32:]) if bits == 5 else (bytes(32), rest)
        values: list[float] = []
        for group in range(8):
            if group < 4:
                factor, minimum = six[group] & 63, six[group + 4] & 63
            else:
                factor = (six[group + 4] & 15) | (six[group - 4] >> 6) << 4
                minimum = (six[group + 4] >> 4) | (six[group] >> 6) << 4
            for i in range(32):
                digit = low[32 * (group // 2) + i] >> 4 * (group % 2) & 15
                digit |= (high[i] >> group & 1) << 4
                values.append(scale * factor * digit - low_scale * minimum)
        return values

    return unpack


def _pack_q6_k(block: Floats) -> bytes:
    groups = block.reshape(16, 16)
    steps = groups[np.arange(16), np.abs(groups).argmax(axis=1)] / -32
    scale = float(np.float16(steps[np.abs(steps).argmax()] / -128))
    factors = [int(factor) for factor in np.clip(np.rint(steps / scale if scale else steps * 0), -128, 127)]
    levels = _levels(groups, scale * np.array(factors), -32 * scale * np.array(factors), 63)
    low, high = bytearray(128), bytearray(64)
    for i, level in enumerate(levels):
        half, quarter, at = i // 128, i % 128 // 32, i % 32
        low[64 * half + 32 * (quarter % 2) + at] |= (level & 15) << 4 * (quarter // 2)
        high[32 * half + at] |= (level >> 4) << 2 * quarter
    return bytes(low) + bytes(high) + struct.pack("16b", *factors) + _half(scale)


def _unpack_q6_k(data: bytes) -> list[float]:
    low, high = data[:128], data[128:192]
    factors = struct.unpack("16b", data[192:208])
    (scale,) = struct.unpack("<e", data[208:])
    values = []
    for i in range(256):
        half, quarter, at = i // 128, i % 128 // 32, i % 32
        digit = low[64 * half + 32 * (quarter % 2) + at] >> 4 * (quarter // 2) & 15
        digit |= (high[32 * half + at] >> 2 * quarter & 3) << 4
        values.append(scale * factors[i // 16] * (digit - 32))
    return values


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _pack_mxfp4(block: Floats) -> bytes:
    """A shared power of two, and four-bit floats of a sign, two bits of exponent and one of mantissa."""
    top = float(np.abs(block).max())
    exponent = int(np.ceil(np.log2(top / 6))) if top else -127
    ranks = np.abs(np.abs(block)[:, None] / 2.0**exponent - np.array(_FP4)).argmin(axis=1)
    codes = [int(rank) | (8 if value < 0 else 0) for rank, value in zip(ranks, block, strict=True)]
    return bytes([exponent + 127]) + bytes(codes[i] | codes[i + 16] << 4 for i in range(16))


def _unpack_mxfp4(data: bytes) -> list[float]:
    codes = [byte & 15 for byte in data[1:]] + [byte >> 4 for byte in data[1:]]
    return [(-1.0 if code & 8 else 1.0) * _FP4[code & 7] * 2.0 ** (data[0] - 127) for code in codes]


_BLOCKS: Mapping[str, tuple[int, Callable[[Floats], bytes], Callable[[bytes], list[float]]]] = {
    "Q4_0": (32, _pack_signed(4), _unpack_signed(4)),
    "Q5_0": (32, _pack_signed(5), _unpack_signed(5)),
    "Q4_1": (32, _pack_between(4), _unpack_between(4)),
    "Q5_1": (32, _pack_between(5), _unpack_between(5)),
    "Q8_0": (32, _pack_q8_0, _unpack_q8_0),
    "Q4_K": (256, _pack_k(4), _unpack_k(4)),
    "Q5_K": (256, _pack_k(5), _unpack_k(5)),
    "Q6_K": (256, _pack_q6_k, _unpack_q6_k),
    "MXFP4": (32, _pack_mxfp4, _unpack_mxfp4),
}
