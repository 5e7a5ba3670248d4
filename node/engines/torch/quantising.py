"""Full-precision numbers into MLX's affine packing, to the bit as MLX packs them on a processor.

Owns the arithmetic, and reading a stored tensor as if its file held it packed: some rows at a time, in host memory, so
that a matrix never exists as it is stored. Which tensors are packed is `cluster.models.quantising`, where they go
`weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Final

import torch

from cluster.models.checkpoint import StoredTensor
from cluster.models.family import Family
from cluster.models.matrices import Matrix, Role
from cluster.models.quantising import GROUP, is_turned, packed_at_load
from cluster.quantities import MIB
from cluster.types import DType
from node.engines.torch.tensors import STORED_DTYPES, TORCH_DTYPES

CHUNK_ELEMENTS: Final = MIB // 4
"""Numbers that are packed at a time: a core's cache holds them in float32, and no slice is so small that it shows."""

_SCALE_MIN: Final = 1e-7
"""MLX's: what a group of equal numbers is divided by."""


@dataclass(slots=True)
class Packer:
    """Reads what `matrices` of full precision are made into; any other tensor is read as it is stored."""

    matrices: Mapping[str, Matrix]
    family: Family
    bits: int
    dtype: DType  # of scales and biases
    device: torch.device
    read_stored: Callable[[StoredTensor], torch.Tensor]
    fill: Callable[[torch.Tensor, StoredTensor], None]
    packed: dict[str, Matrix] = field(init=False)
    _sources: dict[str, Matrix] = field(init=False)
    _made: dict[str, torch.Tensor] = field(init=False, default_factory=dict)
    _room: Room = field(init=False, default_factory=lambda: Room())

    def __post_init__(self) -> None:
        self.packed = packed_at_load(self.matrices, self.family, self.bits, self.dtype)
        changed = [name for name, matrix in self.packed.items() if matrix is not self.matrices[name]]
        self._sources = {self.packed[name].values.name: self.matrices[name] for name in changed}

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Codes are asked for before what scales them, and everything once."""
        source = self._sources.get(tensor.name)
        if source is not None:
            self._make(source, self.packed[source.name])
        return self._made.pop(tensor.name) if tensor.name in self._made else self.read_stored(tensor)

    def _make(self, source: Matrix, packed: Matrix) -> None:
        made = {role: self._memory_for(tensor) for role, tensor in packed.tensors.items()}
        codes, scales, biases = (made[role].flatten(0, -2) for role in (Role.VALUES, Role.SCALES, Role.BIASES))
        codes = codes.view(torch.uint8)
        columns, turned = packed.shape[-1], is_turned(source.name, self.family)
        stored, rows = source.values, codes.shape[0]
        step = packed.shape[-2] if turned else max(1, CHUNK_ELEMENTS // columns)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            begin = stored.begin + first * columns * stored.dtype.size_bytes
            end = stored.begin + last * columns * stored.dtype.size_bytes
            shape = (columns, step) if turned else (last - first, columns)
            landing = self._room.stored(shape, STORED_DTYPES[stored.dtype])
            self.fill(landing, replace(stored, shape=shape, begin=begin, end=end))
            values, part = landing.T if turned else landing, slice(first, last)
            pack_rows(values, self.bits, codes[part], scales[part], biases[part], self._room)
        self._made |= {packed.tensors[role].name: made[role] for role in made}

    def _memory_for(self, tensor: StoredTensor) -> torch.Tensor:
        dtype = torch.int32 if tensor.dtype is DType.U32 else TORCH_DTYPES[tensor.dtype]
        return torch.empty(tensor.shape, dtype=dtype, device=self.device)


def pack_rows(
    values: torch.Tensor,
    bits: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor,
    room: Room | None = None,
) -> None:
    """Pack `values` [rows, columns] into `codes` [rows, columns x bits / 8], bytes with the first number in the lowest
    bits, and into `scales` and `biases` [rows, columns / GROUP], wherever these three are."""
    rows, columns = values.shape
    room = room or Room()
    step = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        groups = room.floats(values[part].shape)
        groups.copy_(values[part])
        groups = groups.view(-1, columns // GROUP, GROUP)
        scale, bias = _scale_and_bias(groups, bits)
        _to_steps(groups, scale, bias, bits)
        steps = room.bytes(values[part].shape)
        steps.copy_(groups.view(steps.shape))
        _put(steps, bits, codes[part])
        scales[part].copy_(scale)
        biases[part].copy_(bias)


class Room:
    """Memory that chunk after chunk is packed in. Without it, what is made for good would lie between what is freed,
    and the holes would stay with the process."""

    def __init__(self) -> None:
        self._floats, self._bytes = torch.empty(0), torch.empty(0, dtype=torch.uint8)
        self._stored = torch.empty(0, dtype=torch.uint8)

    def floats(self, shape: Sequence[int]) -> torch.Tensor:
        if self._floats.numel() < prod(shape):
            self._floats = torch.empty(prod(shape))
        return self._floats[: prod(shape)].view(*shape)

    def bytes(self, shape: Sequence[int]) -> torch.Tensor:
        if self._bytes.numel() < prod(shape):
            self._bytes = torch.empty(prod(shape), dtype=torch.uint8)
        return self._bytes[: prod(shape)].view(*shape)

    def stored(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """For numbers as they are in a file."""
        size = prod(shape) * dtype.itemsize
        if self._stored.numel() < size:
            self._stored = torch.empty(size, dtype=torch.uint8)
        return self._stored[:size].view(dtype).view(*shape)


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of `values` [rows, columns] after packing, in their own type."""
    groups = values.float().view(-1, values.shape[-1] // GROUP, GROUP).clone()
    scale, bias = _scale_and_bias(groups, bits)
    _to_steps(groups, scale, bias, bits)
    scale, bias = scale.to(values.dtype).float(), bias.to(values.dtype).float()
    return groups.mul_(scale[..., None]).add_(bias[..., None]).view(values.shape).to(values.dtype)


def _to_steps(groups: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, bits: int) -> None:
    """Numbers to codes, in their place."""
    groups.sub_(bias[..., None]).div_(scale[..., None]).round_().clamp_(0, (1 << bits) - 1)


def _scale_and_bias(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One of each for every group, so that a code times the scale plus the bias is about the number. The end of a
    group's range that is farther from zero is met exactly, and so is zero."""
    low, high = groups.amin(-1), groups.amax(-1)
    is_low = low.abs() > high.abs()
    scale = ((high - low) / ((1 << bits) - 1)).clamp_(min=_SCALE_MIN)
    scale = torch.where(is_low, scale, -scale)
    edge = torch.where(is_low, low, high)
    zero = (edge / scale).round_()  # the code of zero, negated
    is_wide = zero != 0
    return torch.where(is_wide, edge / zero, scale), torch.where(is_wide, edge, 0.0)


def _put(steps: torch.Tensor, bits: int, codes: torch.Tensor) -> None:
    """Bytes with one code each into bytes of codes without gaps. What `steps` hold is lost."""
    if bits == 4:
        even, odd = steps[:, 0::2], steps[:, 1::2]
        codes.copy_(odd.bitwise_left_shift_(4).bitwise_or_(even))
    elif bits == 6:
        # Four codes are three bytes: 6 + 2, 4 + 4 and 2 + 6 bits.
        first, second, third, fourth = (steps[:, place::4] for place in range(4))
        for place, byte in enumerate((first | second << 6, second >> 2 | third << 4, third >> 4 | fourth << 2)):
            codes[:, place::3] = byte
    else:
        codes.copy_(steps)
