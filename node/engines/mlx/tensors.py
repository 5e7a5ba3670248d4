"""Tensors on their way between host memory in our vocabulary and MLX. Knows nothing of models.

numpy has no bfloat16, so on the host a tensor is its bits: 16-bit floats of either kind travel as uint16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from cluster.steps import Boundary
from cluster.types import DType, HostTensor, TensorSpec

Bits = npt.NDArray[Any]
"""A tensor on the host as unsigned integers of its element size."""

MLX_DTYPES = {DType.F32: mx.float32, DType.F16: mx.float16, DType.BF16: mx.bfloat16}
"""The element types that this engine computes in."""

_HOST_BITS = {2: np.uint16, 4: np.uint32}
_MLX_BITS = {2: mx.uint16, 4: mx.uint32}


def check_inputs(inputs: Boundary | None, boundary: Sequence[TensorSpec], tokens: int) -> None:
    """Raise ValueError unless `inputs` is exactly what `boundary` promises for this many tokens."""
    found = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in inputs or ()]
    expected = [(str(spec.dtype), (tokens, *spec.shape)) for spec in boundary]
    if found != expected:
        raise ValueError(f"expected boundary tensors {expected} for {tokens} tokens, found {found}")


def host_bits(tensor: HostTensor) -> Bits:
    """The tensor's bits, not copied."""
    return np.frombuffer(tensor.data, dtype=_HOST_BITS[tensor.dtype.size_bytes]).reshape(tensor.shape)


def new_bits(shape: tuple[int, ...], dtype: DType) -> Bits:
    return np.empty(shape, dtype=_HOST_BITS[dtype.size_bytes])


def from_bits(bits: Bits, dtype: DType) -> mx.array:
    return mx.array(bits).view(MLX_DTYPES[dtype])


def as_bits(array: mx.array) -> mx.array:
    """The array's bits, still in MLX: evaluate these together with everything else, then read them."""
    return array.view(_MLX_BITS[array.dtype.size])


def read_bits(bits: mx.array) -> Bits:
    """Evaluated bits as numpy sees them, not copied."""
    return np.asarray(memoryview(bits))  # type: ignore[arg-type]


def to_host(bits: Bits, dtype: DType) -> HostTensor:
    return HostTensor(dtype, bits.shape, np.ascontiguousarray(bits).data.cast("B") if bits.size else b"")
