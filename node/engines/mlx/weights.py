"""Filling a slice's parameters from safetensors files, one tensor at a time.

MLX reads a file's tensors lazily, so what the stage does not own is never read; each owned tensor is read straight
into the memory where it stays. Afterwards every parameter came from a file and no unowned one exists. Knows names,
shapes and bytes; which tensors a stage owns is `cluster.models.layout`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import infer_quant_config

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint, StoredTensor
from cluster.models.families import family_of
from cluster.models.formats import MLX_MODES, Packing, read_quantization
from cluster.models.integer_shapes import INTEGER_PACKINGS
from cluster.models.layout import Layer, Part, canonical_name, owned_tensors, part_of, within_layer
from cluster.models.matrices import read_matrices
from cluster.models.quantising import GROUP, bits_to_pack
from cluster.types import Backend, DType
from node.engine import AwaitTensors, LoadProgress, Progress, StageSpec
from node.engines.mlx.arguments import Arguments
from node.engines.mlx.by_rows import split_off
from node.engines.mlx.experts import in_stacks
from node.engines.mlx.family import MlxFamily
from node.engines.mlx.integers import confirm, in_affine_form, make_exact, take_out_biases, with_experts_stacked
from node.engines.mlx.repack import Doubt
from node.engines.mlx.rows import RowReader
from node.engines.mlx.slicing import SlicedModel, build_model
from node.engines.mlx.sources import Computed
from node.engines.mlx.tensors import MLX_DTYPES

_CODES = {DType.U32, DType.U8, DType.I32, DType.I64, DType.F8_E4M3}
_READABLE = frozenset({DType.F32, DType.F16, DType.BF16, *_CODES})
"""Parameters, the packed matrices and scales of MLX's own formats, and the numbers of others."""

_QUANTIZATION = frozenset({"group_size", "bits", "mode"})
"""Settings for all layers; other keys of `quantization` name a layer."""

_INTEGERS = {"group_size": 32, "bits": 4}
"""Wherever integers came from they are in MLX's form now, and each matrix tells its own bits and groups."""

_OF_OTHERS: Mapping[str, Mapping[str, object]] = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "awq": _INTEGERS,
    "gptq": _INTEGERS,
    "compressed-tensors": _INTEGERS,
}
"""What configurations of others mean in MLX's words."""


def load_slice(
    checkpoint: Checkpoint, arguments: Arguments, spec: StageSpec, progress: Progress
) -> tuple[SlicedModel, int]:
    """The stage's part of the model with its weights in memory, and the bytes that they take."""
    owned = owned_tensors(checkpoint, spec.layers, spec.layer_count)
    model = build_model(arguments)
    where, dtype = str(checkpoint.folder), MLX_DTYPES[spec.boundary[0].dtype]
    stated = read_quantization(checkpoint.config, where)
    bits = bits_to_pack(spec.bits, stated, where)
    integers = stated if stated is not None and stated.kind in INTEGER_PACKINGS else None
    lazy, experts, doubts = _lazy_tensors(checkpoint.folder, owned), dict[str, Computed](), list[Doubt]()
    matrices = read_matrices(owned, stated, where).values()
    packed_by_mlx = (matrix for matrix in matrices if matrix.packing in MLX_MODES)
    if unread := [matrix.name for matrix in packed_by_mlx if Backend.MLX not in matrix.readers]:
        raise ModelError(f"{where}: MLX does not compute {unread[0]!r} exactly as it is packed; use torch nodes")
    if integers is not None:
        lazy, experts, doubts = in_affine_form(lazy, matrices, integers, dtype)
    family, _ = family_of(checkpoint.config, where)
    lazy, sources = split_off(lazy, matrices, family, stated=stated, bits=bits, dtype=dtype)
    rows = RowReader(checkpoint.folder, {**sources, **experts})
    lazy = _in_order_of_mlx(lazy | rows.marks(), arguments.family)
    weights = _sanitised(model, lazy, _witness(checkpoint, arguments.family, lazy))
    if integers is not None:
        weights = with_experts_stacked(weights, lazy)
    del lazy  # else every expert would outlive the stack that it was copied to
    weights = rows.placed(weights)
    sliced = SlicedModel(model, arguments, spec.layers, dtype)
    if stated is None or stated.kind is not Packing.FP8:
        _quantise(model, weights, checkpoint, bits)
    if integers is not None:
        make_exact(model, weights, dtype)
        doubts += take_out_biases(weights, dict(tree_flatten(model.parameters())))
    _check(model, weights, spec)
    total_bytes = _read(model, weights, rows, progress, _Arriving(owned, spec.await_tensors))
    confirm(doubts)
    sliced.seal()
    # Rotation frequencies are arrays as well, in no file and no parameter; nothing may stay unevaluated, because
    # MLX would tie it to this thread.
    mx.eval(model)
    return sliced, total_bytes


def _lazy_tensors(folder: Path, owned: Sequence[StoredTensor]) -> dict[str, mx.array]:
    lazy: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in owned}):
        try:
            in_file: Any = mx.load(str(folder / file))
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"{folder / file}: MLX cannot read it ({error}); download it again") from error
        for tensor in owned:
            if tensor.file == file:
                if tensor.dtype not in _READABLE:
                    raise ModelError(f"{tensor.name} is stored as {tensor.dtype}, which the MLX engine does not read")
                lazy[canonical_name(tensor.name)] = in_file[tensor.name]
    return lazy


def _in_order_of_mlx(lazy: Mapping[str, mx.array], family: MlxFamily) -> dict[str, mx.array]:
    """The tensors as mlx-lm takes them for granted, still lazily."""
    ordered: dict[str, mx.array] = {}
    for name, array in lazy.items():
        inner = within_layer(name)
        if inner in family.transposed and array.ndim == 3:
            ordered[f"{name}.weight"] = array.swapaxes(-1, -2)
        elif inner in family.raised:
            wide = array.astype(mx.float32)  # a narrower type would round the differences
            ordered[name] = wide - mx.minimum(wide.min(), 0)
        else:
            ordered[name] = array
    return ordered if family.stacks is None else in_stacks(ordered, family.stacks)


def _witness(checkpoint: Checkpoint, family: MlxFamily, lazy: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A tensor of an unowned layer by which mlx-lm tells how all are stored, where the slice has none: its shape,
    and zeros that nobody computes."""
    if family.witness is None or any(within_layer(name) == family.witness for name in lazy):
        return {}
    stored = (tensor for tensor in checkpoint.tensors.values() if within_layer(tensor.name) == family.witness)
    return {canonical_name(tensor.name): mx.zeros(tensor.shape) for tensor in stored}


def _sanitised(model: Any, lazy: dict[str, mx.array], witness: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The tensors as mlx-lm's model wants them. It may rename and stack (experts), still lazily."""
    if not hasattr(model, "sanitize"):
        return lazy
    try:
        sanitised = dict(model.sanitize({**lazy, **witness}))
    except (KeyError, ValueError) as error:
        raise ModelError(f"a tensor that the model needs is missing or has the wrong shape: {error}") from error
    return {name: array for name, array in sanitised.items() if name not in witness}


def _quantise(model: nn.Module, weights: Mapping[str, mx.array], checkpoint: Checkpoint, bits: int | None) -> None:
    """Turn layers whose weights are packed into MLX's quantised ones, as the configuration says for each, or `bits`
    for those that are packed only now."""
    stated = checkpoint.config.get("quantization") or checkpoint.config.get("quantization_config")
    if bits is not None:
        stated = {"group_size": GROUP, "bits": bits}
    if not stated:
        return
    if isinstance(stated, dict):
        stated = _OF_OTHERS.get(str(stated.get("quant_method")), stated)
    if not isinstance(stated, Mapping) or "group_size" not in stated or "bits" not in stated:
        raise ModelError(f"{checkpoint.folder}: expected quantization with group_size and bits, found {stated!r:.80}")
    overrides = {canonical_name(f"{path}.weight"): how for path, how in stated.items() if path not in _QUANTIZATION}

    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        override = overrides.get(f"{path}.weight", True)
        # The defaults need not hold for a layer that is not named; its shapes say how it is packed.
        return infer_quant_config(path, module, weights) if override is True else override

    try:
        nn.quantize(
            model,
            group_size=stated["group_size"],
            bits=stated["bits"],
            mode=stated.get("mode", "affine"),
            class_predicate=how,
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"{checkpoint.folder}: MLX cannot unpack quantization {stated!r:.80}: {error}") from error


def _check(model: nn.Module, weights: Mapping[str, mx.array], spec: StageSpec) -> None:
    """Every parameter has its tensor and every tensor its parameter, alike in shape and kind; all of them owned."""
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    if missing := sorted(parameters.keys() - weights.keys()):
        raise ModelError(f"no file holds {', '.join(missing[:4])} ({len(missing)} missing); download the model again")
    if unknown := sorted(weights.keys() - parameters.keys()):
        raise ModelError(f"the MLX engine has no use for {', '.join(unknown[:4])} ({len(unknown)} such tensors)")
    for name, parameter in parameters.items():
        stored = weights[name]
        if stored.shape != parameter.shape:
            raise ModelError(f"{name}: expected shape {parameter.shape} by config.json, found {stored.shape}")
        if mx.issubdtype(stored.dtype, mx.floating) != mx.issubdtype(parameter.dtype, mx.floating):
            raise ModelError(f"{name}: expected a tensor like {parameter.dtype}, found {stored.dtype}")
        part = part_of(name)
        owned = part.index in spec.layers if isinstance(part, Layer) else spec.is_first or spec.is_last
        assert owned, f"{name} is not of stage {spec.layers}"


class _Arriving:
    """Waits for what parameters are made of. mlx-lm renames and stacks tensors, but never across parts."""

    def __init__(self, owned: Sequence[StoredTensor], await_tensors: AwaitTensors) -> None:
        self._parts: dict[Part, list[StoredTensor]] = {}
        for tensor in sorted(owned, key=lambda tensor: (tensor.file, tensor.begin)):
            self._parts.setdefault(part_of(tensor.name), []).append(tensor)
        self._order = {part: place for place, part in enumerate(self._parts)}
        self._owned = owned
        self._await_tensors = await_tensors

    def place(self, parameter: str) -> int:
        """Parts in the order in which they lie in the files, which is the order in which they arrive."""
        return self._order.get(part_of(parameter), len(self._order))

    def wait_for(self, parameter: str) -> None:
        """What has no tensors of its own, such as a tied head, may be made of any."""
        self._await_tensors(tensor.name for tensor in self._parts.get(part_of(parameter), self._owned))


def _read(
    model: nn.Module, weights: dict[str, mx.array], rows: RowReader, progress: Progress, arriving: _Arriving
) -> int:
    """Read tensor by tensor. Returns the bytes that all take."""
    total_bytes, done_bytes = sum(array.nbytes for array in weights.values()), 0
    progress(LoadProgress(0, total_bytes))
    for name in sorted(weights, key=arriving.place):
        array = weights.pop(name)
        arriving.wait_for(name)
        try:
            if name in rows:
                array = rows.read(name)
            mx.eval(array)
        except (RuntimeError, OSError) as error:
            raise ModelError(f"{name} cannot be read ({error}); download the model again") from error
        model.load_weights([(name, array)], strict=False)
        done_bytes += array.nbytes
        progress(LoadProgress(min(done_bytes, total_bytes), total_bytes))
    return total_bytes
