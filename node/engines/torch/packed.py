"""Matrices that stay packed in memory: their codes, what scales them, and how rows of them become numbers.

Every format is a frozen bundle of tensors that can be cut by rows, gathered by rows and turned into numbers. Numbers
are made in float32 and rounded once to the type that is asked for, so they are what a dequantised checkpoint would
hold. Knows nothing of files, names or models; products with such matrices are `products`'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm
from typing import assert_never

import torch

_BYTE = torch.uint8

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the three lower bits of an FP4 (E2M1) number mean; the fourth is the sign."""


@dataclass(frozen=True, slots=True)
class Affine:
    """Codes of 2 to 8 bits, times a scale, plus a bias, for each group of columns; MLX's packing."""

    codes: torch.Tensor  # uint8 [rows, columns * bits / 8]: codes along a row, lowest bits first
    scales: torch.Tensor  # [rows, groups]
    biases: torch.Tensor  # [rows, groups]
    bits: int

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[-1] * 8 // self.bits

    def values(self) -> torch.Tensor:
        grouped = _numbers(self.codes, self.bits).unflatten(-1, (self.scales.shape[-1], -1))
        grouped.mul_(self.scales.float().unsqueeze(-1)).add_(self.biases.float().unsqueeze(-1))
        return grouped.flatten(-2)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Four-bit floats, 32 of which share an exponent."""

    codes: torch.Tensor  # uint8 [rows, columns / 2]: the even column in the lower bits
    scales: torch.Tensor  # uint8 [rows, columns / 32]: exponents plus 127

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[-1] * 2

    def values(self) -> torch.Tensor:
        grouped = _looked_up(self.codes, _fp4_pairs(str(self.codes.device))).view(torch.float32)
        grouped = grouped.unflatten(-1, (self.scales.shape[-1], 32))
        return grouped.mul_(_looked_up(self.scales, _powers(str(self.codes.device))).unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True, slots=True)
class Fp8:
    """Eight-bit floats (E4M3) with a scale for each block of columns in each row."""

    codes: torch.Tensor  # uint8 [rows, columns]
    scales: torch.Tensor  # [rows or scaled blocks of rows, blocks of columns]
    block: int  # columns that share a scale
    height: int = 1  # rows that share a scale
    above: int = 0  # rows of the first block that lie above this part

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[-1]

    def values(self) -> torch.Tensor:
        values = self._unscaled()
        rows = (torch.arange(values.shape[0], device=values.device) + self.above) // self.height
        scales = self.scales.float()[rows]
        if self.columns == self.block * scales.shape[-1]:
            return values.unflatten(-1, (-1, self.block)).mul_(scales.unsqueeze(-1)).flatten(-2)
        for index in range(scales.shape[-1]):
            values[:, index * self.block : (index + 1) * self.block].mul_(scales[:, index : index + 1])
        return values

    def _unscaled(self) -> torch.Tensor:
        """Two numbers at a time where a processor's cache holds what all pairs of codes mean."""
        device = self.codes.device
        if device.type != "cpu" or self.columns % 2:
            return _looked_up(self.codes, _fp8(str(device)))
        return _looked_up(self.codes.contiguous().view(torch.uint16), _fp8_pairs()).view(torch.float32)


Packed = Affine | Mxfp4 | Fp8


def rows_of(packed: Packed, first: int, last: int) -> Packed:
    """Rows [first, last), sharing memory."""
    match packed:
        case Affine() | Mxfp4():
            return _with_rows(packed, slice(first, last))
        case Fp8(codes, scales, _, height, above):
            begin, end = (first + above) // height, -(-(last + above) // height)
            return replace(
                packed, codes=codes[first:last], scales=scales[begin:end], above=first + above - begin * height
            )
        case _:
            assert_never(packed)


def gathered(packed: Packed, rows: torch.Tensor) -> Packed:
    """The rows with these indexes, in that order; a copy of their codes."""
    match packed:
        case Affine() | Mxfp4():
            return _with_rows(packed, rows)
        case Fp8(codes, scales, block, height, above):
            return Fp8(codes[rows], scales[(rows + above) // height], block)
        case _:
            assert_never(packed)


def tensors_of(packed: Packed) -> tuple[torch.Tensor, ...]:
    """Everything that it keeps in memory."""
    match packed:
        case Affine(codes, scales, biases):
            return codes, scales, biases
        case Mxfp4(codes, scales) | Fp8(codes, scales):
            return codes, scales
        case _:
            assert_never(packed)


def _with_rows(packed: Affine | Mxfp4, rows: slice | torch.Tensor) -> Affine | Mxfp4:
    match packed:
        case Affine(codes, scales, biases, bits):
            return Affine(codes[rows], scales[rows], biases[rows], bits)
        case Mxfp4(codes, scales):
            return Mxfp4(codes[rows], scales[rows])
        case _:
            assert_never(packed)


def codes_of(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, columns] of codes that lie one after another, whether or not they end with a byte."""
    if bits == 8:
        return packed
    every = lcm(bits, 8)  # so many bits hold whole codes and are whole bytes
    chunks = packed.unflatten(-1, (-1, every // 8))
    codes = packed.new_empty((*chunks.shape[:-1], every // bits))
    for place in range(every // bits):
        byte, shift = divmod(place * bits, 8)
        code = chunks[..., byte] >> shift
        if shift + bits > 8:
            code = code | (chunks[..., byte + 1] << (8 - shift))
        codes[..., place] = code & ((1 << bits) - 1)
    return codes.flatten(-2)


def _numbers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The same in float32."""
    if bits == 4:
        return _looked_up(packed, _code_pairs(str(packed.device))).view(torch.float32)
    return codes_of(packed, bits).float()


def _looked_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """What each byte, or pair of bytes, means, side by side. Much faster than torch's conversions of narrow types."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


@lru_cache
def _code_pairs(device: str) -> torch.Tensor:
    byte = torch.arange(256)
    return torch.stack((byte & 15, byte >> 4), dim=-1).float().view(torch.int64).flatten().to(device)


@lru_cache
def _fp4_pairs(device: str) -> torch.Tensor:
    number = torch.tensor([*_FP4, *(-value for value in _FP4)])
    byte = torch.arange(256)
    return torch.stack((number[byte & 15], number[byte >> 4]), dim=-1).view(torch.int64).flatten().to(device)


@lru_cache
def _fp8(device: str) -> torch.Tensor:
    return torch.arange(256, dtype=_BYTE).view(torch.float8_e4m3fn).float().to(device)


@lru_cache
def _fp8_pairs() -> torch.Tensor:
    both, numbers = torch.arange(1 << 16), _fp8("cpu")
    return torch.stack((numbers[both & 255], numbers[both >> 8]), dim=-1).view(torch.int64).flatten()


@lru_cache
def _powers(device: str) -> torch.Tensor:
    """2 to the power of each byte less 127; the last one stands for no number."""
    return torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [torch.nan]).to(device)
