"""Filling a slice from safetensors files, straight from the disk to where the numbers are used.

Each tensor's bytes are read into its parameter's own memory, or through one small buffer when the parameter is
on another device, of another type, or laid out otherwise, so that a load never needs more than the slice. Packed
matrices stay packed; plain ones are put in the order of the processor's products, where it has one. Before anything is
read, every element of every parameter has its place in a file, and every tensor its parameter. Knows bytes; which
tensors a stage owns is `cluster.models.layout`, where they go is `places`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint, StoredTensor
from cluster.models.families import family_of
from cluster.models.formats import Packing, read_quantization
from cluster.models.integer_shapes import INTEGER_PACKINGS
from cluster.models.matrices import read_matrices
from cluster.models.quantising import bits_to_pack
from cluster.quantities import MIB
from node.engine import LoadProgress, Progress, StageSpec
from node.engines.torch.integers import confirm_zero, take_out_biases
from node.engines.torch.packing import Slot, is_ordered, stand_ins
from node.engines.torch.places import Place, find_places
from node.engines.torch.quantising import Packer
from node.engines.torch.slicing import SlicedModel, stored_tensors
from node.engines.torch.tensors import STORED_DTYPES, bytes_of

_READ_BYTES = 8 * MIB
"""One read, one progress report; also the size of the buffer on the way to another device or type."""


def load_weights(
    sliced: SlicedModel,
    checkpoint: Checkpoint,
    spec: StageSpec,
    tensors: Sequence[StoredTensor],
    device: torch.device,
    progress: Progress,
) -> int:
    """Give every parameter memory on `device` and its values from `tensors`; returns the bytes they take."""
    where = str(checkpoint.folder)
    quantization = read_quantization(checkpoint.config, where)
    matrices = read_matrices(tensors, quantization, where)
    used = [tensor for matrix in matrices.values() for tensor in matrix.used]
    unused = [tensor.name for tensor in tensors if tensor not in used]
    reader = _Reader(spec, device, progress, sum(tensor.size_bytes for tensor in used))
    read, bits = reader.read, bits_to_pack(spec.bits, quantization, where)
    if bits is not None:
        family, _ = family_of(checkpoint.config, where)
        packer = Packer(matrices, family, bits, spec.boundary[0].dtype, device, reader.read, reader.fill)
        matrices, read = packer.packed, packer.read
    meta = dict(stored_tensors(sliced.model))
    has_integers = quantization is not None and quantization.kind in INTEGER_PACKINGS
    strays = take_out_biases(matrices, sliced.local_name, meta) if has_integers else []
    plain, packed = _apart(find_places(sliced, meta, matrices.values(), checkpoint))
    in_order = _in_order(sliced, meta, plain) if device.type == "cpu" else {}
    plain = [place for place in plain if place.parameter not in in_order]
    slots = [Slot.free(sliced.model, meta[name], name, places) for name, places in (packed | in_order).items()]
    _widen(sliced, plain)
    _materialise(sliced.model, device)
    parameters = dict(stored_tensors(sliced.model))
    jobs: list[Place | Slot] = [*plain, *slots]
    for place in sorted(jobs, key=_begins):  # as they arrive
        if isinstance(place, Slot):
            if place.name in in_order:
                place.fill_in_order(sliced, reader.fill_rows)
            else:
                place.fill(sliced, quantization, read)
            continue
        parameter = parameters[place.parameter]
        reader.fill(place.view(parameter), place.matrix.values)
        if place.less:
            parameter.sub_(place.less)
    confirm_zero(strays, reader.read)
    spec.await_tensors(unused)  # nothing to compute with, and a stage is whole only with all that it owns
    return sum(tensor.nbytes for tensor in parameters.values()) + sum(item.nbytes for item in stand_ins(sliced.model))


def _begins(place: Place | Slot) -> tuple[str, int]:
    """Where the first of its values lie."""
    places = place.places if isinstance(place, Slot) else (place,)
    return min((other.matrix.values.file, other.matrix.values.begin) for other in places)


def _apart(places: Sequence[Place]) -> tuple[list[Place], dict[str, list[Place]]]:
    """The places of plain tensors, and for each packed parameter its own."""
    plain: list[Place] = []
    packed: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        if place.matrix.packing is Packing.NONE:
            plain.append(place)
        else:
            packed[place.parameter].append(place)
    if both := {place.parameter for place in plain} & packed.keys():
        raise ModelError(
            f"the torch engine computes no {min(both)!r} of which a part is packed and another is not; "
            "use another version of this model"
        )
    return plain, packed


def _in_order(sliced: SlicedModel, meta: Mapping[str, torch.Tensor], plain: Sequence[Place]) -> dict[str, list[Place]]:
    """The places of those plain parameters that are put in the order of the processor's products."""
    places: dict[str, list[Place]] = defaultdict(list)
    for place in plain:
        places[place.parameter].append(place)
    return {name: found for name, found in places.items() if is_ordered(sliced, meta[name], found)}


def _widen(sliced: SlicedModel, places: Sequence[Place]) -> None:
    """Parameters whose values are shifted are float32, as their module computes: the shift rounds nothing then."""
    for place in places:
        if place.less:
            owner, _, name = place.parameter.rpartition(".")
            module = sliced.model.get_submodule(owner)
            wide = torch.empty_like(getattr(module, name), dtype=torch.float32)
            setattr(module, name, torch.nn.Parameter(wide, requires_grad=False))


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


@dataclass(slots=True)
class _Reader:
    """Bytes of files on their way to tensors."""

    spec: StageSpec
    device: torch.device
    progress: Progress
    total_bytes: int
    done_bytes: int = 0
    buffer: torch.Tensor = field(default_factory=lambda: torch.empty(_READ_BYTES, dtype=torch.uint8))

    def __post_init__(self) -> None:
        self.progress(LoadProgress(0, self.total_bytes))

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The tensor as it is stored, on the device."""
        if tensor.dtype not in STORED_DTYPES:
            raise ModelError(
                f"{tensor.name!r} is stored as {tensor.dtype}, which belongs to no packed format; download again"
            )
        result = torch.empty(tensor.shape, dtype=STORED_DTYPES[tensor.dtype], device=self.device)
        self.fill(result, tensor)
        return result

    def fill_rows(self, tensor: StoredTensor, region: torch.Tensor, first: int) -> None:
        """Read rows of a tensor, of all its matrices on end, into the region, from the row `first` on."""
        self.fill(region, tensor, first * region.shape[1] * tensor.dtype.size_bytes)

    def fill(self, region: torch.Tensor, tensor: StoredTensor, skipped: int = 0) -> None:
        """Read the tensor into a region of the same shape, or what follows so many bytes of it."""
        self.spec.await_tensors((tensor.name,))
        try:
            descriptor = os.open(self.spec.folder / tensor.file, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"{tensor.file} cannot be read ({error.strerror}); it holds {tensor.name!r}") from error
        try:
            self._fill(descriptor, region, tensor, tensor.begin + skipped)
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, region: torch.Tensor, tensor: StoredTensor, offset: int) -> None:
        """From `offset` on, piece by piece: a region that is not contiguous has contiguous parts, or small ones."""
        stored, size = STORED_DTYPES[tensor.dtype], tensor.dtype.size_bytes
        direct = region.device.type == "cpu" and region.dtype == stored
        pieces: tuple[torch.Tensor, ...]
        if region.is_contiguous():
            pieces = region.view(-1).split(self.buffer.numel() // size)
        elif region.numel() * size <= self.buffer.numel():
            pieces = (region,)
        else:
            for part in region:
                self._fill(descriptor, part, tensor, offset)
                offset += part.numel() * size
            return
        for piece in pieces:
            count = piece.numel() * size
            landing = piece if direct and piece.is_contiguous() else self.buffer[:count].view(stored).view(piece.shape)
            _read_exactly(descriptor, bytes_of(landing), offset, tensor)
            if landing is not piece:
                piece.copy_(landing)
            offset += count
            self.done_bytes += count
            self.progress(LoadProgress(self.done_bytes, self.total_bytes))


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
