"""The numbers of packing at load: torch makes what MLX makes, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from node.engines.torch import quantising
from node.engines.torch.quantising import pack_rows, rounded

DTYPES = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """Ordinary rows, and such as have no range, one sign, ties, or numbers near the smallest ones."""
    rows = torch.randn(96, 320, generator=torch.Generator().manual_seed(0)) * 0.05
    rows[0], rows[1], rows[2] = 0, 3e-9, -1e-3
    rows[3, :64] = 0.25
    rows[4], rows[5] = rows[4].abs(), -rows[5].abs()
    rows[6] = torch.arange(320) % 16 * 0.125 - 1.0
    rows[7] *= 1e-9
    rows[8, ::64] = 100.0
    return rows.to(dtype)


def packed(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = values.shape
    codes = torch.empty(rows, columns * bits // 8, dtype=torch.uint8)
    scales, biases = (torch.empty(rows, columns // 64, dtype=values.dtype) for _ in range(2))
    pack_rows(values, bits, codes, scales, biases)
    return codes, scales, biases


def by_mlx(values: torch.Tensor, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    array = mx.array(values.float().numpy()).astype(DTYPES[values.dtype])
    codes, scales, biases = mx.quantize(array, group_size=64, bits=bits, stream=mx.cpu)
    return codes, scales, biases


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_scales_and_biases_are_those_of_mlx(
    dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantising, "CHUNK_ELEMENTS", 7 * 320)  # chunks that do not divide the rows
    values = awkward(dtype)
    codes, scales, biases = by_mlx(values, bits)
    found = packed(values, bits)
    np.testing.assert_array_equal(found[0].numpy(), np.array(codes).view(np.uint8))
    np.testing.assert_array_equal(found[1].float().numpy(), np.array(scales.astype(mx.float32)))
    np.testing.assert_array_equal(found[2].float().numpy(), np.array(biases.astype(mx.float32)))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_what_is_left_of_the_numbers_is_what_mlx_unpacks(bits: int) -> None:
    values = awkward(torch.float32)
    expected = np.array(mx.dequantize(*by_mlx(values, bits), group_size=64, bits=bits, stream=mx.cpu))
    # Multiplied and added at once, or one after the other.
    np.testing.assert_allclose(rounded(values, bits).numpy(), expected, rtol=1e-6, atol=1e-8)
