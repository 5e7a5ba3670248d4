"""Matrices in the place of a slice's parameters: packed ones (whole, stacks of experts, what expands latents), and
plain ones in the order of the processor's products.

Knows no files and no formats; `layouts` reads the packed ones, matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cluster.models.checkpoint import StoredTensor
from cluster.models.formats import Quantization
from node.engines.torch.in_planes import in_planes
from node.engines.torch.integers import Read
from node.engines.torch.latent import Halves
from node.engines.torch.layouts import read_packed
from node.engines.torch.ordered import Ordered, OrderedStack, has_order, in_order
from node.engines.torch.packed import Affine, Packed
from node.engines.torch.places import Place, stack_of
from node.engines.torch.products import Joined, Stack, Whole
from node.engines.torch.slicing import SlicedModel

StandIn = Whole | Stack | Halves | Ordered | OrderedStack

_EXPANSIONS = "kv_b_proj.weight"
"""They are multiplied transposed too, which no kernel does; their halves are not."""


_STACKS = ("experts.gate_up_proj", "experts.down_proj")
"""Their modules multiply with one expert after the other."""

FillStored = Callable[[StoredTensor, torch.Tensor, int], None]
"""Reads rows of a stored tensor into the region, from the row with that index on; of all its matrices on end."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a stored tensor."""

    tensor: StoredTensor
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter that gives way to other matrices, wherever the model uses it."""

    name: str
    parameter: torch.Tensor  # on the meta device
    users: Sequence[tuple[torch.nn.Module, str]]
    places: Sequence[Place]  # what to put there

    @classmethod
    def free(cls, model: torch.nn.Module, parameter: torch.Tensor, name: str, places: Sequence[Place]) -> Slot:
        """Take the parameter out of the model."""
        users = _users(model, parameter)
        for module, attribute in users:
            del module._parameters[attribute]
        return cls(name, parameter, users, places)

    def fill(self, sliced: SlicedModel, quantization: Quantization | None, read: Read) -> None:
        """Put in its place the packed matrices that the places hold."""
        looks_up = [isinstance(module, torch.nn.Embedding) for module, _ in self.users]
        is_expansion, is_halved = self.name.endswith(_EXPANSIONS), self.places[0].half is not None
        is_multiplied = not all(looks_up) and (is_halved or not is_expansion)

        def wholes(place: Place) -> list[Whole]:
            shape, dtype = tuple(place.view(self.parameter).shape), self.parameter.dtype
            matrices, order = read_packed(place.matrix, shape, quantization, read)
            if is_multiplied:
                return _multiplied(matrices, order, dtype, looked_up=any(looks_up))
            return [Whole(matrix, dtype, order) for matrix in matrices]

        stand_in: StandIn
        if self.parameter.ndim == 3:
            stand_in = _stack(sliced, self, wholes)
        elif is_expansion and is_halved:
            keys, values = (wholes(place) for place in sorted(self.places, key=lambda place: place.half or 0))
            stand_in = Halves(keys, values)
        else:
            (stand_in,) = wholes(self.places[0])
        self._put(stand_in)

    def fill_in_order(self, sliced: SlicedModel, fill: FillStored) -> None:
        """Put in its place the plain matrix, or stack of them, that the places hold."""
        dtype = self.parameter.dtype
        if self.parameter.ndim == 2:
            self._put(in_order(self.parameter.shape, dtype, partial(fill, self.places[0].matrix.values)))
            return
        places = {(place.expert, place.half): place for place in self.places}
        count, outputs, inputs = self.parameter.shape
        experts = []
        for index in range(count):
            pieces = _rows_of(places, index, outputs)
            experts.append(in_order(torch.Size((outputs, inputs)), dtype, partial(_fill_pieces, fill, pieces)))
        _take_one_by_one(sliced)
        self._put(OrderedStack(experts))

    def _put(self, stand_in: StandIn) -> None:
        for module, attribute in self.users:
            setattr(module, attribute, stand_in)


def is_ordered(sliced: SlicedModel, parameter: torch.Tensor, places: Sequence[Place]) -> bool:
    """Whether plain matrices are only multiplied, by a product for which they may be put in order."""
    name = places[0].parameter
    if name.endswith(_EXPANSIONS) or not has_order(parameter.dtype) or any(place.less for place in places):
        return False
    if parameter.ndim == 3 and name.endswith(_STACKS):
        return stack_of(sliced, name) == (False, False)
    linears = all(type(module) is torch.nn.Linear for module, _ in _users(sliced.model, parameter))
    return parameter.ndim == 2 and linears and places[0].is_whole


def stand_ins(model: torch.nn.Module) -> list[StandIn]:
    """Everything that was put in the place of a parameter, each once."""
    values = (value for module in model.modules() for value in vars(module).values())
    return list({id(value): value for value in values if isinstance(value, StandIn)}.values())


def _users(model: torch.nn.Module, parameter: torch.Tensor) -> tuple[tuple[torch.nn.Module, str], ...]:
    return tuple(
        (module, attribute)
        for module in model.modules()
        for attribute, value in module._parameters.items()
        if value is parameter
    )


def _stack(sliced: SlicedModel, slot: Slot, wholes: Callable[[Place], list[Whole]]) -> Stack:
    """The experts in order, each of one matrix or of its gates and ups."""
    transposed, in_turns = stack_of(sliced, slot.name)
    parts: dict[tuple[int, int | None], Whole] = {}
    for place in slot.places:
        for index, whole in enumerate(wholes(place), start=place.expert or 0):
            parts[index, place.half] = whole
    experts: list[Whole | Joined] = []
    for index in range(slot.parameter.shape[0]):
        if (index, None) in parts:
            experts.append(parts[index, None])
        else:
            experts.append(Joined(parts[index, 0], parts[index, 1], in_turns=in_turns))
    _take_one_by_one(sliced)
    return Stack(experts, transposed=transposed)


def _take_one_by_one(sliced: SlicedModel) -> None:
    """The library's other ways of computing experts gather whole stacks of weights."""
    sliced.model.config._experts_implementation = "eager"


def _rows_of(places: Mapping[tuple[int | None, int | None], Place], expert: int, outputs: int) -> list[_Rows]:
    """Where an expert's rows are stored: in a tensor of its own or of all, gates and ups together or apart."""
    halves: tuple[int | None, ...] = (0, 1) if any(half is not None for _, half in places) else (None,)
    count = outputs // len(halves)
    rows = []
    for half in halves:
        own = places.get((expert, half))
        place = own or places[None, half]
        rows.append(_Rows(place.matrix.values, 0 if own else expert * count, count))
    return rows


def _fill_pieces(fill: FillStored, pieces: Sequence[_Rows], region: torch.Tensor, first: int) -> None:
    """Read rows of a matrix that lies in pieces into the region, from the row `first` on."""
    begin, last = 0, first + region.shape[0]
    for piece in pieces:
        end = begin + piece.count
        here = slice(max(first, begin), min(last, end))
        if here.start < here.stop:
            fill(piece.tensor, region[here.start - first : here.stop - first], piece.first + here.start - begin)
        begin = end


def _multiplied(
    matrices: Sequence[Packed], order: torch.Tensor | None, dtype: torch.dtype, *, looked_up: bool
) -> list[Whole]:
    """In the form that is fastest for products."""
    affine = [matrix for matrix in matrices if isinstance(matrix, Affine)]
    ordered = in_planes(affine, dtype, looked_up=looked_up) if len(affine) == len(matrices) else None
    return [Whole(matrix, dtype, order) for matrix in ordered or matrices]
