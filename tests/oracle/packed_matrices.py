"""Matrices as MLX packs them, in torch's memory, each with the numbers that it stands for; and how products with them
are judged. Needs MLX."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mlx", reason="MLX packs the matrices")

import mlx.core as mx
from torch.profiler import ProfilerActivity, profile

from node.engines.torch import int4
from node.engines.torch.in_planes import in_planes
from node.engines.torch.packed import Affine, Fp8, Mxfp4
from node.engines.torch.planes import Planes

ROWS, COLUMNS = 192, 256


def in_torch(array: mx.array) -> torch.Tensor:
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.int16))).view(torch.bfloat16)
    if array.dtype == mx.uint32:
        return torch.from_numpy(np.array(array).view(np.uint8))
    return torch.from_numpy(np.array(array))


def random(*shape: int, offset: float = 0.0, seed: int = 0) -> mx.array:
    return mx.array((np.random.default_rng(seed).normal(size=shape) + offset).astype(np.float32))


def affine(
    bits: int = 4, group: int = 64, dtype: mx.Dtype = mx.float32, columns: int = COLUMNS, **others: Any
) -> tuple[Affine, torch.Tensor]:
    """A packed matrix, and its numbers as MLX unpacks them in float32."""
    codes, scales, biases = mx.quantize(random(ROWS, columns, **others).astype(dtype), group_size=group, bits=bits)
    exact = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), group_size=group, bits=bits)
    return Affine(in_torch(codes), in_torch(scales), in_torch(biases), bits), in_torch(exact)


def mxfp4() -> tuple[Mxfp4, torch.Tensor]:
    codes, scales = mx.quantize(random(ROWS, COLUMNS), group_size=32, bits=4, mode="mxfp4")
    exact = mx.dequantize(codes, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
    return Mxfp4(in_torch(codes), in_torch(scales)), in_torch(exact)


def fp8(height: int, width: int) -> tuple[Fp8, torch.Tensor]:
    """By torch's own conversion of each number."""
    codes = in_torch(random(ROWS, COLUMNS)).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-ROWS // height), -(-COLUMNS // width)) + 0.5
    whole = scales.repeat_interleave(height, 0)[:ROWS].repeat_interleave(width, 1)[:, :COLUMNS]
    return Fp8(codes.view(torch.uint8), scales, block=width, height=height), codes.float() * whole


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def kernel(matrix: Affine, *, looked_up: bool = False) -> Planes | None:
    copied = Affine(matrix.codes.clone(), matrix.scales, matrix.biases, matrix.bits)
    found = in_planes([copied], torch.bfloat16, looked_up=looked_up)
    return found and found[0]


needs_kernel = pytest.mark.skipif(not int4.is_usable(), reason="this processor has no kernel for four bits")


def peak_bytes(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    here = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(here))
