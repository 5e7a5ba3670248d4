"""Tensors on their way between host memory in our vocabulary and torch. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.errors import UsageError
from cluster.types import DType, HostTensor, TensorSpec

TORCH_DTYPES = {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}
"""The element types that this engine computes in."""

STORED_DTYPES = {
    **TORCH_DTYPES,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.U32: torch.int32,  # codes are moved, never computed with as they are
    DType.U8: torch.uint8,
    DType.F8_E4M3: torch.uint8,
}
"""What the tensors of packed formats are read as."""


def device_from(text: str) -> torch.device:
    """Turn `cpu`, `cuda`, `cuda:1` or `mps` into a torch device that exists here."""
    kind, _, index = text.partition(":")
    if kind == "cpu" and not index:
        return torch.device("cpu")
    if kind == "mps" and not index and torch.backends.mps.is_available():
        return torch.device("mps")
    if kind == "cuda" and (index == "" or index.isdecimal()):
        count = torch.cuda.device_count()
        if int(index or 0) < count:
            return torch.device("cuda", int(index or 0))
        raise UsageError(f"device {text} does not exist: torch sees {count} CUDA devices; run `potluck doctor`")
    raise UsageError(f"expected a torch device such as cpu, cuda:0 or mps (on a Mac), found {text!r}")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous host tensor's own memory as writable bytes, through uint8 because numpy has no bfloat16."""
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")


def from_host(tensor: HostTensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; on the host it shares memory with `tensor` where that is writable."""
    view = memoryview(tensor.data).cast("B")
    if view.readonly or view.nbytes == 0:
        result = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
        if view.nbytes:
            bytes_of(result)[:] = view
    else:
        result = torch.frombuffer(view, dtype=TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
    return result.to(device)


def to_host(tensor: torch.Tensor, spec: TensorSpec) -> HostTensor:
    """The tensor as the bytes that leave this stage."""
    host = tensor.detach().to(device="cpu", dtype=TORCH_DTYPES[spec.dtype]).contiguous()
    data = bytes_of(host) if host.numel() else b""
    return HostTensor(dtype=spec.dtype, shape=tuple(host.shape), data=data)


def check_inputs(inputs: Sequence[HostTensor] | None, boundary: Sequence[TensorSpec], tokens: int) -> None:
    """Raise ValueError unless `inputs` is exactly what `boundary` promises for this many tokens."""
    found = [] if inputs is None else [(str(tensor.dtype), tensor.shape) for tensor in inputs]
    expected = [(str(spec.dtype), (tokens, *spec.shape)) for spec in boundary]
    if found != expected:
        raise ValueError(f"expected boundary tensors {expected} for {tokens} tokens, found {found}")
