"""Where each stored matrix goes in a slice: which parameter, and which part of it.

Owns: the differences between what files hold and what `transformers` computes with. Files of transformers hold its
parameters, except that experts may lie singly. Files that `mlx_lm.convert` wrote hold what mlx-lm computes with, and
the differences are undone here, each for its reason. Reads no values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from cluster.models.formats import Packing
from cluster.models.layout import Embedding, part_of
from cluster.models.matrices import Matrix, Role
from node.engines.torch.slicing import SlicedModel
from node.engines.torch.tensors import TORCH_DTYPES

View = Callable[[torch.Tensor], torch.Tensor]
"""The part of a parameter that a stored matrix fills, shaped as it is stored and sharing memory."""

_EXPERTS = re.compile(
    r"(?P<block>.+\.)(?:experts\.(?P<index>\d{1,6})|experts|experts\.switch_glu|switch_mlp)\."
    r"(?P<part>gate|up|down)_proj\.(?P<kind>weight|bias)"
)
"""Published checkpoints hold three tensors for each expert, mlx-lm's three for each layer; transformers has two
parameters for each layer."""

_LATENT = re.compile(r"(?P<attention>.+\.self_attn)\.(?P<half>embed_q|unembed_out)\.weight")
"""mlx-lm keeps what makes keys and values of latents apart, and that for keys transposed."""

_CONVOLUTIONS = ("conv1d.weight", "conv.conv.weight")
"""[channels, 1, kernel] in torch, [channels, kernel, 1] in MLX."""

_RAISED_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight")
_RAISED_FAMILIES = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
"""Their norms multiply by (1 + weight); mlx-lm stores the sum."""

_BITS = frozenset({2, 3, 4, 5, 6, 8})
"""Of MLX's codes."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored matrix goes."""

    matrix: Matrix
    parameter: str
    view: View
    expert: int | None = None  # None: all of the stack, where the parameter is one
    half: int | None = None  # gates are the first half of an expert's outputs, ups the second; keys and values alike
    less: int = 0  # what was added to the values before they were stored

    @property
    def is_whole(self) -> bool:
        """Whether the matrix is the parameter as it is."""
        return self.view is _whole and not self.less


def find_places(
    sliced: SlicedModel, parameters: Mapping[str, torch.Tensor], matrices: Iterable[Matrix], checkpoint: Checkpoint
) -> list[Place]:
    """A place for each matrix; ModelError for one that the model has no use for, or that does not fit there."""
    raised = _is_raised(sliced, checkpoint)
    places = [_place(sliced, parameters, matrix, raised=raised) for matrix in matrices]
    _check(places, sliced, parameters)
    return places


def stack_of(sliced: SlicedModel, parameter: str) -> tuple[bool, bool]:
    """How the module of a stack of experts keeps them: [inputs, outputs], and gates and ups in turns."""
    module = sliced.model.get_submodule(parameter.rpartition(".")[0])
    return bool(getattr(module, "is_transposed", False)), not getattr(module, "is_concatenated", True)


def _is_raised(sliced: SlicedModel, checkpoint: Checkpoint) -> bool:
    """Whether norms are stored with one added. mlx-lm does it together with turning the convolutions."""
    if sliced.model.config.model_type not in _RAISED_FAMILIES:
        return False
    windows = [tensor.shape for tensor in checkpoint.tensors.values() if tensor.name.endswith("conv1d.weight")]
    return any(len(shape) == 3 and shape[1] != 1 for shape in windows)


def _place(sliced: SlicedModel, parameters: Mapping[str, torch.Tensor], matrix: Matrix, *, raised: bool) -> Place:
    name = sliced.local_name(matrix.name)
    if name in parameters:
        less = int(raised and (name.endswith(_RAISED_NORMS) or name == "model.norm.weight"))
        return Place(matrix, name, _view_of_whole(sliced, name, matrix), less=less)
    if isinstance(part_of(matrix.name), Embedding) and name.endswith(".weight") and "lm_head.weight" in parameters:
        return Place(matrix, "lm_head.weight", _whole)  # a tied head without the embedding
    if match := _EXPERTS.fullmatch(name):
        ending = "_bias" if match["kind"] == "bias" else ""
        parameter = f"{match['block']}experts.{'down' if match['part'] == 'down' else 'gate_up'}_proj{ending}"
        if parameter in parameters:
            index = None if match["index"] is None else int(match["index"])
            half = {"gate": 0, "up": 1, "down": None}[match["part"]]
            transposed, in_turns = stack_of(sliced, parameter)
            outputs = -1 if ending else -2
            transposed = transposed and not ending
            view = _view_of_experts(index, half, outputs=outputs, transposed=transposed, in_turns=in_turns)
            return Place(matrix, parameter, view, index, half)
    if (match := _LATENT.fullmatch(name)) and (parameter := f"{match['attention']}.kv_b_proj.weight") in parameters:
        attention = sliced.model.get_submodule(match["attention"])
        half = ("embed_q", "unembed_out").index(match["half"])
        return Place(matrix, parameter, _view_of_latents(attention, half), half=half)
    file = matrix.values.file
    raise ModelError(f"{file} holds {matrix.values.name!r}, which {type(sliced.model).__name__} has no place for")


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _turned(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.transpose(1, 2)


def _view_of_whole(sliced: SlicedModel, name: str, matrix: Matrix) -> View:
    if name.endswith(_CONVOLUTIONS) and len(matrix.shape) == 3 and matrix.shape[1] != 1:
        return _turned
    if matrix.packing is not Packing.NONE and len(matrix.shape) == 3 and stack_of(sliced, name)[0]:
        return _turned  # packed along the inputs, though the unpacked tensor would have the outputs last
    return _whole


def _view_of_experts(index: int | None, half: int | None, *, outputs: int, transposed: bool, in_turns: bool) -> View:
    """`outputs`: the axis along which gates and ups lie, from the last one."""

    def view(parameter: torch.Tensor) -> torch.Tensor:
        stack = parameter.transpose(1, 2) if transposed else parameter
        if index is not None:
            stack = stack[index]
        if half is None:
            return stack
        if in_turns:
            return stack.unflatten(outputs, (-1, 2)).select(outputs, half)
        return stack.unflatten(outputs, (2, -1)).select(outputs - 1, half)

    return view


def _view_of_latents(attention: torch.nn.Module, half: int) -> View:
    plain, heads = int(attention.qk_nope_head_dim), int(attention.num_heads)

    def view(parameter: torch.Tensor) -> torch.Tensor:
        of_heads = parameter.view(heads, -1, parameter.shape[1])
        return of_heads[:, plain:] if half else of_heads[:, :plain].transpose(1, 2)

    return view


def _check(places: Iterable[Place], sliced: SlicedModel, parameters: Mapping[str, torch.Tensor]) -> None:
    """Types and shapes agree, and every element of every parameter is filled exactly once."""
    filled: Counter[str] = Counter()
    for place in places:
        matrix, parameter = place.matrix, parameters[place.parameter]
        if matrix.packing is Packing.NONE and matrix.dtype not in TORCH_DTYPES:
            raise ModelError(
                f"{matrix.name!r} is stored as {matrix.dtype}; the torch engine reads {', '.join(TORCH_DTYPES)} and "
                "the packed formats that config.json names. Choose another version of this model"
            )
        if place.expert is not None and place.expert >= parameter.shape[0]:
            raise ModelError(
                f"{matrix.name!r} is one expert more than the {parameter.shape[0]} that config.json states"
            )
        expected = tuple(place.view(parameter).shape)
        if not _fits(matrix, expected):
            raise ModelError(f"{matrix.name!r} has shape {matrix.shape}; config.json makes it {expected}")
        filled[place.parameter] += prod(expected)
    for name, parameter in parameters.items():
        if filled[name] != parameter.numel():
            missing = "is missing" if filled[name] == 0 else "is missing some experts"
            raise ModelError(
                f"{sliced.whole_name(name)!r} {missing}: {type(sliced.model).__name__} needs it, "
                "and the model's files do not hold it; download the model again"
            )


def _fits(matrix: Matrix, expected: tuple[int, ...]) -> bool:
    """Bits of MLX's codes follow from what the model expects: recipes vary them, and need not say where."""
    if matrix.packing is not Packing.AFFINE:
        return matrix.shape == expected
    return matrix.shape[:-1] == expected[:-1] and expected[-1] > 0 and affine_bits(matrix, expected[-1]) is not None


def affine_bits(matrix: Matrix, columns: int) -> int | None:
    """Bits of a code when so many columns are packed; None when they cannot be so many."""
    bits, rest = divmod(32 * matrix.values.shape[-1], columns)
    groups = matrix.tensors[Role.SCALES].shape[-1]
    return bits if rest == 0 and bits in _BITS and columns % groups == 0 else None
