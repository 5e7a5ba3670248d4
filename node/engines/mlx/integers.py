"""AWQ, GPTQ and compressed-tensors checkpoints on MLX: their matrices as mlx-lm's packed modules want them.

Everything stays lazy until it is read; experts are read one after the other (`Computed`), so that no stack of them is
there twice. mlx-lm's own preparation of weights leaves other matrices as they are; one that it takes apart is refused,
because it would treat codes as numbers. Which bits mean what is `node.engines.mlx.repack`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from cluster.errors import ModelError
from cluster.models.formats import Packing, Quantization
from cluster.models.integer_shapes import INTEGER_PACKINGS
from cluster.models.layout import canonical_name
from cluster.models.matrices import Matrix, Role
from node.engines.mlx.exact import ExactLinear, ExactSwitchLinear
from node.engines.mlx.repack import Affine, Doubt, from_awq, from_gptq, from_pack_quantized
from node.engines.mlx.sources import Computed, Made

_EXPERT = re.compile(r"(?P<layer>.+)\.experts\.(?P<index>\d{1,6})\.(?P<matrix>\w+)\.(?P<part>\w+)")


def in_affine_form(
    lazy: Mapping[str, mx.array], matrices: Iterable[Matrix], stated: Quantization, dtype: mx.Dtype
) -> tuple[dict[str, mx.array], dict[str, Computed], list[Doubt]]:
    """The tensors of a checkpoint, with the parts of MLX's packed modules in the place of integers; the experts among
    these; and what has to be confirmed once they are there."""
    arrays: dict[str, mx.array] = {}
    experts: dict[str, Computed] = {}
    doubts: list[Doubt] = []
    for matrix in matrices:
        parts = {role: lazy[canonical_name(tensor.name)] for role, tensor in matrix.tensors.items()}
        name = canonical_name(matrix.name)
        if matrix.packing not in INTEGER_PACKINGS:
            arrays[name] = parts[Role.VALUES]
            continue
        affine = _affine(matrix, parts, stated, dtype)
        stem = name.removesuffix(".weight")
        if affine.inputs is not None:
            arrays[f"{stem}.inputs"] = affine.inputs
        if _EXPERT.fullmatch(name):
            experts[name] = _computed(matrix, affine, stated, dtype)
            continue
        arrays |= {name: affine.words, f"{stem}.scales": affine.scales, f"{stem}.biases": affine.biases}
        doubts += _doubts(matrix, affine)
    return arrays, experts, doubts


def _computed(matrix: Matrix, blueprint: Affine, stated: Quantization, dtype: mx.Dtype) -> Computed:
    """The matrix, to be made anew of its tensors as `blueprint` is of lazy ones."""

    def compute(parts: Mapping[Role, mx.array]) -> tuple[mx.array, ...]:
        affine = _affine(matrix, parts, stated, dtype)
        confirm(_doubts(matrix, affine))
        return affine.words, affine.scales, affine.biases

    made = tuple(
        Made(ending, array.shape[-1], array.dtype)
        for ending, array in (
            ("weight", blueprint.words),
            ("scales", blueprint.scales),
            ("biases", blueprint.biases),
        )
    )
    tensors = {role: tensor for role, tensor in matrix.tensors.items() if tensor in matrix.used}
    return Computed(tensors, blueprint.words.shape[0], made, compute)


def _doubts(matrix: Matrix, affine: Affine) -> list[Doubt]:
    return [Doubt(doubt.holds, f"{matrix.name}: {doubt.message}") for doubt in affine.doubts]


def _affine(matrix: Matrix, parts: Mapping[Role, mx.array], stated: Quantization, dtype: mx.Dtype) -> Affine:
    values, scales = parts[Role.VALUES], parts[Role.SCALES]
    order, bits = parts.get(Role.ORDER), matrix.width.bits
    match matrix.packing:
        case Packing.AWQ:
            return from_awq(values, parts[Role.ZEROS], scales, dtype=dtype)
        case Packing.GPTQ:
            return from_gptq(
                values,
                parts[Role.ZEROS],
                scales,
                order,
                bits=bits,
                symmetric=stated.symmetric,
                zeros_are_one_less=stated.zeros_are_one_less,
                reordered=stated.reordered,
                dtype=dtype,
            )
        case _:
            zeros, reordered = parts.get(Role.ZEROS), stated.reordered
            return from_pack_quantized(values, scales, zeros, order, bits=bits, reordered=reordered, dtype=dtype)


def with_experts_stacked(prepared: Mapping[str, mx.array], given: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """What mlx-lm `prepared` of the weights that it was `given`, with what else experts have, such as the order of
    their columns, stacked as it stacks their words."""
    weights = dict(prepared)
    stacks: dict[str, dict[int, mx.array]] = defaultdict(dict)
    for name, array in given.items():
        match = _EXPERT.fullmatch(name)
        stack = f"{match['layer']}.switch_mlp.{match['matrix']}" if match else ""
        is_words = f"{name.removesuffix('.weight')}.scales" in given
        if is_words and weights.get(name) is not array and f"{stack}.weight" not in weights:
            raise ModelError(f"mlx-lm takes {name} apart, which codes cannot stand; run this model on torch nodes")
        if match and name in weights and not is_words:
            stacks[f"{stack}.{match['part']}"][int(match["index"])] = weights.pop(name)
    for name, arrays in stacks.items():
        weights[name] = mx.stack([arrays[index] for index in sorted(arrays)])
    return weights


def make_exact(model: nn.Module, weights: Mapping[str, mx.array], dtype: mx.Dtype) -> None:
    """Replace packed modules whose columns have an order of their own, or whose scales are wider than `dtype`."""

    def exact(path: str, module: nn.Module) -> nn.Module:
        has_order = f"{path}.inputs" in weights
        scales = weights.get(f"{path}.scales")
        if scales is None or (scales.dtype == dtype and not has_order):
            return module
        if isinstance(module, QuantizedSwitchLinear):
            return ExactSwitchLinear(module, has_order=has_order)
        return ExactLinear(module, has_order=has_order)

    model.update_modules(tree_map_with_path(exact, model.leaf_modules(), is_leaf=nn.Module.is_module))


def take_out_biases(weights: dict[str, mx.array], parameters: Mapping[str, object]) -> list[Doubt]:
    """AutoGPTQ writes a bias beside every matrix, zero where the model has none: to be confirmed once it is there."""
    strays = [name for name in weights if name.endswith(".bias") and name not in parameters]
    return [
        Doubt(mx.all(weights.pop(name) == 0), f"{name} is not zero, and the model has no such bias") for name in strays
    ]


def confirm(doubts: Iterable[Doubt]) -> None:
    """Look at what was taken for granted."""
    for doubt in doubts:
        if not bool(doubt.holds):
            raise ModelError(doubt.message)
