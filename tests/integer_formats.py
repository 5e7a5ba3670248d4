"""Matrices quantised to integers and written as AWQ, GPTQ and compressed-tensors files hold them.

Written from the formats' published definitions, value by value and with numpy alone, so that it shares nothing with
the code that it tests. A matrix is codes, zeros and scales in plain order; `dequantised` is what any reader has to get.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix [rows, inputs]; column i of it belongs to group `groups[i]`."""

    codes: Integers  # [rows, inputs], from 0
    zeros: Integers  # [rows, groups]
    scales: Array  # [rows, groups]
    groups: Integers  # [inputs]
    bits: int

    @property
    def dequantised(self) -> npt.NDArray[np.float32]:
        difference = (self.codes - self.zeros[:, self.groups]).astype(np.float32)
        return difference * self.scales.astype(np.float32)[:, self.groups]


def quantise(
    weight: npt.NDArray[np.float32],
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    order: Integers | None = None,
    dtype: str = "float16",
) -> Quantised:
    """Round to nearest in groups of `group` columns; groups take columns in `order`, else as they come."""
    rows, inputs = weight.shape
    order = np.arange(inputs) if order is None else order
    groups = np.empty(inputs, np.int64)
    groups[order] = np.arange(inputs) // group
    grouped = weight[:, order].reshape(rows, -1, group)
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    if symmetric:
        scales = (np.maximum(-low, high) / (half - 0.5)).astype(dtype)
        zeros = np.full(scales.shape, half)
    else:
        scales = ((high - low) / top).astype(dtype)
        zeros = np.clip(np.rint(-low / scales), 0, top).astype(np.int64)
    wide = scales.astype(np.float32)[:, groups]
    codes = np.clip(np.rint(weight / wide) + zeros[:, groups], 0, top).astype(np.int64)
    return Quantised(codes, zeros, scales, groups, bits)


def awq(matrix: Quantised) -> dict[str, Array]:
    """AutoAWQ's GEMM layout."""
    return {
        "qweight": _words(_interleaved(matrix.codes.T), 4),
        "qzeros": _words(_interleaved(matrix.zeros.T), 4),
        "scales": np.ascontiguousarray(matrix.scales.T),
    }


def gptq(matrix: Quantised, *, version: int = 1) -> dict[str, Array]:
    """AutoGPTQ's layout. Version 1 subtracts one from every zero, in whole words."""
    ones = sum(1 << place for place in range(0, 32, matrix.bits))
    zeros = _words(matrix.zeros.T, matrix.bits).view(np.uint32)
    if version == 1:
        zeros = ((zeros.astype(np.int64) - ones) % (1 << 32)).astype(np.uint32)
    return {
        "qweight": np.ascontiguousarray(_words(matrix.codes, matrix.bits).T),
        "qzeros": zeros.view(np.int32),
        "scales": np.ascontiguousarray(matrix.scales.T),
        "g_idx": matrix.groups.astype(np.int32),
    }


def compressed(matrix: Quantised, *, symmetric: bool = False) -> dict[str, Array]:
    """compressed-tensors' `pack-quantized`: signed integers, stored with half their range added."""
    files: dict[str, Array] = {
        "weight_packed": _words(matrix.codes, matrix.bits),
        "weight_scale": matrix.scales,
        "weight_shape": np.array(matrix.codes.shape, np.int64),
    }
    if not symmetric:
        files["weight_zero_point"] = np.ascontiguousarray(_words(matrix.zeros.T, matrix.bits).T)
    if not np.array_equal(matrix.groups, np.sort(matrix.groups)):
        files["weight_g_idx"] = matrix.groups.astype(np.int32)
    return files


def _interleaved(values: Integers) -> Integers:
    """Of each eight values those of even places first, which AWQ's kernels want."""
    return values.reshape(values.shape[0], -1, 4, 2).swapaxes(-1, -2).reshape(values.shape)


def _words(values: Integers, bits: int) -> npt.NDArray[np.int32]:
    """Along the last axis, the first value in the lowest bits; what is left of the last word is zero."""
    per_word = 32 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[-1] % per_word)))
    places = padded.reshape(values.shape[0], -1, per_word) << (np.arange(per_word) * bits)
    return places.sum(-1).astype(np.uint32).view(np.int32)
