"""The words of the system as types: identifiers, layer ranges, tensors at rest in host memory.

Knows nothing about sockets, files or engines. One word, one meaning; the list is in ARCHITECTURE.md.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from math import prod
from typing import Final, NewType

NodeId = NewType("NodeId", str)  # fingerprint of the node's public key, lower-case hex
HostId = NewType("HostId", str)  # one per machine: nodes with the same one share that machine's memory
CoordinatorId = NewType("CoordinatorId", str)
DeploymentId = NewType("DeploymentId", str)  # one loaded model; one per cluster today
ModelId = NewType("ModelId", str)  # content hash of the model's manifest
Epoch = NewType("Epoch", int)  # one installed plan's number; it fences everything
StepId = NewType("StepId", int)  # one micro-batch's trip through the pipeline, rising within an epoch
SequenceId = NewType("SequenceId", int)  # one choice of one request, unique within a deployment
Format = NewType("Format", str)  # how weights are stored, in the words in which nodes say what they read
AdapterId = NewType("AdapterId", str)


class DType(enum.StrEnum):
    """Element types, named as safetensors names them."""

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    I64 = "I64"
    I32 = "I32"
    I16 = "I16"
    I8 = "I8"
    U64 = "U64"
    U32 = "U32"
    U16 = "U16"
    U8 = "U8"
    BOOL = "BOOL"

    @property
    def size_bytes(self) -> int:
        return _SIZES_BYTES[self]


_SIZES_BYTES = {
    DType.F64: 8, DType.I64: 8, DType.U64: 8,
    DType.F32: 4, DType.I32: 4, DType.U32: 4,
    DType.F16: 2, DType.BF16: 2, DType.I16: 2, DType.U16: 2,
    DType.F8_E4M3: 1, DType.F8_E5M2: 1, DType.I8: 1, DType.U8: 1, DType.BOOL: 1,
}  # fmt: skip


class Backend(enum.StrEnum):
    """The engines that a node can run."""

    TORCH = "torch"
    MLX = "mlx"


CPU: Final = "cpu"
"""The device of engines that compute on a processor."""


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """Decoder layers [first, last) of a model."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise ValueError(f"a layer range is [first, last) with 0 <= first < last, not [{self.first}, {self.last})")

    def __len__(self) -> int:
        return self.last - self.first

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer < self.last

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(range(self.first, self.last))

    def __str__(self) -> str:
        return f"{self.first}-{self.last - 1}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor at a stage boundary looks like per token; the leading token axis is left out."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def token_bytes(self) -> int:
        return prod(self.shape) * self.dtype.size_bytes


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A dense, C-ordered tensor in host memory. numpy has no bfloat16, so the bytes are raw."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        expected = prod(self.shape) * self.dtype.size_bytes
        found = memoryview(self.data).nbytes
        if found != expected:
            raise ValueError(f"{self.dtype} tensor of shape {self.shape} takes {expected} bytes, found {found}")
