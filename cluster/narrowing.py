"""Activations in eight bits for a slow link: half of the bytes, and a little of their precision.

Every 32 numbers of a token share a scale, so that one that is a thousand times larger than the rest, as models keep
some, costs only 31 others their precision. Those of a group lie as far apart as there are groups, which lets numpy work
on all groups at once. Pure: arrays to arrays. Who sends so, and when, is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.types import DType, HostTensor

GROUP: Final = 32
"""Numbers to a scale: with two bytes for each, a narrow tensor has 17 bytes for 32 of a 16-bit one."""

_BLOCK_NUMBERS: Final = 1 << 15
"""Worked on at once, so that what lies between stays in a core's cache."""

_LEVELS: Final = 127

_TOKENS_COMPARED: Final = 32
"""Of 512 tokens so few cost a fifth of what narrowing them all does, and a thousand numbers of each make a mean."""

NARROWABLE: Final = frozenset({DType.BF16, DType.F16, DType.F32})

_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class NarrowTensor:
    """A tensor of `dtype` and `shape` [tokens, ...]: first the numbers in eight bits, then their scales in BF16."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        expected, found = narrow_bytes(self.shape), memoryview(self.data).nbytes
        if found != expected:
            raise ValueError(f"a narrow tensor of shape {self.shape} takes {expected} bytes, found {found}")


def narrow_bytes(shape: tuple[int, ...]) -> int:
    tokens, width = _rows(shape)
    return tokens * (width + 2 * _groups(width))


def narrow(tensor: HostTensor) -> NarrowTensor:
    """In eight bits, each number rounded to a 127th of its group's largest (or a little more: scales are rounded up).
    Infinity and NaN make their group's scale infinite: they spoil the token, as they would have done."""
    tokens, width = _rows(tensor.shape)
    groups = _groups(width)
    source = np.frombuffer(tensor.data, _STORED[tensor.dtype]).reshape(tokens, width)
    data = np.empty(narrow_bytes(tensor.shape), np.uint8)
    codes = data[: tokens * width].view(np.int8).reshape(tokens, width)
    scales = data[tokens * width :].view(np.uint16).reshape(tokens, groups)
    padded = np.zeros((_block(width), groups * GROUP), np.float32)
    for at in range(0, tokens, len(padded)):
        block = source[at : at + len(padded)]
        floats = padded[: len(block)]
        floats[:, :width] = _as_floats(block, tensor.dtype)
        grouped = floats.reshape(len(block), GROUP, groups)
        with np.errstate(invalid="ignore", divide="ignore"):
            largest = np.maximum(grouped.max(axis=1), -grouped.min(axis=1))
            stored = _rounded_up(largest / _LEVELS)
            scales[at : at + len(block)] = stored
            grouped *= (1 / _wide(stored))[:, None, :]
            np.rint(floats, out=floats)
            codes[at : at + len(block)] = floats[:, :width]
    return NarrowTensor(tensor.dtype, tensor.shape, data.data)


def widen(tensor: NarrowTensor) -> HostTensor:
    """The numbers that `tensor` stands for, in its own type."""
    tokens, width = _rows(tensor.shape)
    groups = _groups(width)
    codes = np.frombuffer(tensor.data, np.int8, tokens * width).reshape(tokens, width)
    scales = _wide(np.frombuffer(tensor.data, np.uint16, offset=tokens * width).reshape(tokens, groups))
    result = np.empty((tokens, width), _STORED[tensor.dtype])
    scales[np.isinf(scales)] = np.nan  # not a number however often it is taken, none times too
    padded = np.zeros((_block(width), groups * GROUP), np.float32)
    for at in range(0, tokens, len(padded)):
        block = codes[at : at + len(padded)]
        floats = padded[: len(block)]
        floats[:, :width] = block
        with np.errstate(invalid="ignore", over="ignore"):
            floats.reshape(len(block), GROUP, groups)[:] *= scales[at : at + len(block), None, :]
            np.clip(floats, -_LARGEST[tensor.dtype], _LARGEST[tensor.dtype], out=floats)  # scales were rounded up
            _store(floats[:, :width], tensor.dtype, result[at : at + len(block)])
    return HostTensor(tensor.dtype, tensor.shape, result.reshape(-1).view(np.uint8).data)


def error_of(tensor: HostTensor) -> float | None:
    """What eight bits do to it: the rms of the difference to that of the numbers. Some tokens tell, taken all over it;
    None where there is nothing to compare with, as among zeros or where a number is infinite."""
    tokens, width = _rows(tensor.shape)
    numbers = np.frombuffer(tensor.data, _STORED[tensor.dtype]).reshape(tokens, width)
    some = np.ascontiguousarray(numbers[:: -(-tokens // _TOKENS_COMPARED)])
    sample = HostTensor(tensor.dtype, some.shape, some.view(np.uint8).reshape(-1).data)
    before = _as_floats(some, tensor.dtype).astype(np.float64)
    arrived = np.frombuffer(widen(narrow(sample)).data, some.dtype).reshape(some.shape)
    after = _as_floats(arrived, tensor.dtype).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = float(np.sqrt(np.mean((after - before) ** 2) / np.mean(before**2)))
    return error if isfinite(error) else None


_STORED = {DType.BF16: np.uint16, DType.F16: np.float16, DType.F32: np.float32}
"""numpy has no bfloat16: the upper half of a float32."""

_LARGEST = {DType.BF16: 3.3895314e38, DType.F16: 65_504.0, DType.F32: float(np.finfo(np.float32).max)}


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _groups(width: int) -> int:
    return -(-width // GROUP)


def _block(width: int) -> int:
    return max(1, _BLOCK_NUMBERS // max(1, width))


def _wide(stored: npt.NDArray[np.uint16]) -> _Floats:
    return (stored.astype(np.uint32) << 16).view(np.float32)


def _as_floats(block: npt.NDArray[np.generic], dtype: DType) -> npt.NDArray[np.generic]:
    return _wide(block.view(np.uint16)) if dtype is DType.BF16 else block


def _rounded_up(floats: _Floats) -> npt.NDArray[np.uint16]:
    """As BF16, never below: so no number is beyond the last level. A group of zeros has the smallest scale."""
    bits = np.maximum(floats, np.finfo(np.float32).tiny).view(np.uint32) & _NO_SIGN  # NaN may have one
    return np.asarray(np.minimum(bits + 0xFFFF, _INFINITY) >> 16, dtype=np.uint16)


_INFINITY, _NO_SIGN = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)


def _store(floats: _Floats, dtype: DType, into: npt.NDArray[np.generic]) -> None:
    if dtype is DType.BF16:
        bits = np.ascontiguousarray(floats).view(np.uint32)
        into[...] = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to the nearest, and to even between two
    else:
        into[...] = floats
