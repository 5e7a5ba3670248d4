"""Filling a slice's parameters from safetensors files, straight from the disk to where they are used.

Each tensor's bytes are read into its parameter's own memory, or through one small buffer when the parameter is
on another device or of another type, so that a load never needs more than the slice. Before anything is read,
every element of every parameter has its place in a file, and every tensor its parameter. Knows names, shapes
and bytes; which tensors a stage owns is `cluster.models.layout`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from cluster.errors import ModelError
from cluster.models.checkpoint import StoredTensor
from cluster.models.layout import Embedding, part_of
from cluster.quantities import MIB
from node.engine import LoadProgress, Progress, StageSpec
from node.engines.torch.slicing import SlicedModel, stored_tensors
from node.engines.torch.tensors import TORCH_DTYPES, bytes_of

_READ_BYTES = 8 * MIB
"""One read, one progress report; also the size of the buffer on the way to another device or type."""

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d{1,6})\.(?P<part>gate|up|down)_proj\.weight")
"""Checkpoints hold three tensors per expert; `transformers` stacks all of a layer's into two parameters."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a stored tensor goes: a whole parameter, or one expert's part of a stacked one."""

    tensor: StoredTensor
    parameter: str
    expert: int | None = None
    half: int | None = None  # gates are the first half of an expert's rows, ups the second

    def region(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part of the parameter that the tensor fills; contiguous, sharing its memory."""
        if self.expert is None:
            return parameter
        rows = parameter[self.expert]
        return rows if self.half is None else rows.chunk(2)[self.half]


def load_weights(
    sliced: SlicedModel, spec: StageSpec, tensors: Sequence[StoredTensor], device: torch.device, progress: Progress
) -> int:
    """Give every parameter memory on `device` and its values from `tensors`; returns the bytes they take."""
    meta = dict(stored_tensors(sliced.model))
    places = _places(sliced, meta, tensors)
    _check(places, sliced, meta)
    _materialise(sliced.model, device)
    parameters = dict(stored_tensors(sliced.model))
    done_bytes, total_bytes = 0, sum(tensor.size_bytes for tensor in tensors)
    progress(LoadProgress(done_bytes, total_bytes))
    buffer = torch.empty(_READ_BYTES, dtype=torch.uint8)
    for place in sorted(places, key=lambda place: (place.tensor.file, place.tensor.begin)):  # as they arrive
        spec.await_tensors((place.tensor.name,))
        for count in _fill(place.region(parameters[place.parameter]), place.tensor, spec.folder, buffer):
            done_bytes += count
            progress(LoadProgress(done_bytes, total_bytes))
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def _places(sliced: SlicedModel, parameters: dict[str, torch.Tensor], tensors: Sequence[StoredTensor]) -> list[_Place]:
    places = []
    for tensor in tensors:
        name = sliced.local_name(tensor.name)
        match = _EXPERT.fullmatch(name)
        stack = "down_proj" if match and match["part"] == "down" else "gate_up_proj"
        if name in parameters:
            places.append(_Place(tensor, name))
        elif isinstance(part_of(tensor.name), Embedding) and "lm_head.weight" in parameters:
            places.append(_Place(tensor, "lm_head.weight"))  # a tied head without the embedding
        elif match and (stacked := f"{match['experts']}.{stack}") in parameters:
            half = {"gate": 0, "up": 1, "down": None}[match["part"]]
            places.append(_Place(tensor, stacked, int(match["index"]), half))
        else:
            raise ModelError(f"{tensor.file} holds {tensor.name!r}, which {_class_name(sliced)} has no place for")
    return places


def _check(places: Sequence[_Place], sliced: SlicedModel, parameters: dict[str, torch.Tensor]) -> None:
    """Types and shapes agree, and every element of every parameter is filled exactly once."""
    filled: Counter[str] = Counter()
    for place in places:
        tensor, parameter = place.tensor, parameters[place.parameter]
        if tensor.dtype not in TORCH_DTYPES:
            raise ModelError(
                f"{tensor.name!r} is stored as {tensor.dtype}; the torch engine reads {', '.join(TORCH_DTYPES)}. "
                "Run a quantised model on MLX nodes, or choose the unquantised one"
            )
        if place.expert is not None and place.expert >= parameter.shape[0]:
            raise ModelError(
                f"{tensor.name!r} is one expert more than the {parameter.shape[0]} that config.json states"
            )
        expected = tuple(place.region(parameter).shape)
        if tensor.shape != expected:
            raise ModelError(f"{tensor.name!r} has shape {tensor.shape}; config.json makes it {expected}")
        filled[place.parameter] += prod(tensor.shape)
    for name, parameter in parameters.items():
        if filled[name] != parameter.numel():
            missing = "is missing" if filled[name] == 0 else "is missing some experts"
            raise ModelError(
                f"{sliced.whole_name(name)!r} {missing}: {_class_name(sliced)} needs it, "
                "and the model's files do not hold it; download the model again"
            )


def _class_name(sliced: SlicedModel) -> str:
    return type(sliced.model).__name__


def _materialise(model: torch.nn.Module, device: torch.device) -> None:
    """Replace parameters on the meta device by uninitialised memory; tied ones stay one."""
    real: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in real:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                real[parameter] = torch.nn.Parameter(empty, requires_grad=False)
            setattr(module, name, real[parameter])
        for name, buffer in list(stored_tensors(module, recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def _fill(region: torch.Tensor, tensor: StoredTensor, folder: Path, buffer: torch.Tensor) -> Iterator[int]:
    """Read the tensor into `region`; yields the bytes of each read."""
    stored = TORCH_DTYPES[tensor.dtype]
    flat = region.view(-1)
    direct = region.device.type == "cpu" and region.dtype == stored
    size = tensor.dtype.size_bytes
    step = _READ_BYTES // size
    try:
        descriptor = os.open(folder / tensor.file, os.O_RDONLY)
    except OSError as error:
        raise ModelError(f"{tensor.file} cannot be read ({error.strerror}); it holds {tensor.name!r}") from error
    try:
        for begin in range(0, flat.numel(), step):
            part = flat[begin : begin + step]
            landing = part if direct else buffer[: part.numel() * size].view(stored)
            _read_exactly(descriptor, bytes_of(landing), tensor.begin + begin * size, tensor)
            if not direct:
                part.copy_(landing)
            yield part.numel() * size
    finally:
        os.close(descriptor)


def _read_exactly(descriptor: int, target: memoryview, offset: int, tensor: StoredTensor) -> None:
    done = 0
    while done < target.nbytes:
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise ModelError(f"{tensor.file} cannot be read ({error.strerror}); it holds {tensor.name!r}") from error
        if count == 0:
            raise ModelError(f"{tensor.file} ends within {tensor.name!r}; download the model again")
        done += count
