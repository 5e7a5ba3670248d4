"""A checkpoint's matrices, sorted by the part of the model that they belong to, and whether its ends are whole.

Knows neither what a layer of a family needs nor what anything costs; that is `cluster.models.facts`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.errors import ModelError
from cluster.models.family import Family
from cluster.models.formats import HALF_EXPERTS, Packing
from cluster.models.layout import Embedding, Head, Layer, LayerInputs, Norm, is_expert, part_of, within_layer
from cluster.models.matrices import Matrix
from cluster.models.quantising import packed_at_load
from cluster.models.shape import Shape
from cluster.types import Backend, DType, Format

_HALF = frozenset({DType.BF16, DType.F16})
_INPUTS = (
    "embed_tokens_per_layer.weight",  # a table to look up in
    "per_layer_model_projection.weight",
    "per_layer_projection_norm.weight",
)


@dataclass(frozen=True, slots=True)
class Parts:
    """The checkpoint's matrices by part; those of a layer by their name within it."""

    embedding: dict[str, Matrix]
    inputs: dict[str, Matrix]
    norm: dict[str, Matrix]
    head: dict[str, Matrix]
    layers: dict[int, dict[str, Matrix]]

    @classmethod
    def of(cls, matrices: Mapping[str, Matrix]) -> Parts:
        parts = cls({}, {}, {}, {}, defaultdict(dict))
        for tensor in matrices.values():
            name = within_layer(tensor.name)
            match part_of(tensor.name):
                case Embedding():
                    parts.embedding[name] = tensor
                case LayerInputs(module):
                    parts.inputs[f"{module}.{name}"] = tensor
                case Norm():
                    parts.norm[name] = tensor
                case Head():
                    parts.head[name] = tensor
                case Layer(index):
                    parts.layers[index][name] = tensor
        return parts

    @property
    def inputs_streamed_bytes(self) -> int:
        """Of what makes layers' own inputs, all but the table to look up in."""
        return sum(matrix.stored_bytes for name, matrix in self.inputs.items() if name != _INPUTS[0])

    @property
    def packings(self) -> frozenset[Packing]:
        parts = (self.embedding, self.inputs, self.norm, self.head, *self.layers.values())
        return frozenset(tensor.packing for part in parts for tensor in part.values())

    @property
    def formats(self) -> frozenset[Format]:
        experts = [
            matrix
            for layer in self.layers.values()
            for name, matrix in layer.items()
            if is_expert(name) and not name.endswith("bias")
        ]
        has_half_experts = any(matrix.packing is Packing.NONE and matrix.dtype in _HALF for matrix in experts)
        # Eight-bit floats are unpacked where MLX runs, to the type that the embedding yields.
        if any(matrix.packing is Packing.FP8 for matrix in experts):
            has_half_experts |= any(matrix.dtype in _HALF for matrix in self.embedding.values())
        return frozenset(map(Format, self.packings)) | ({HALF_EXPERTS} if has_half_experts else set())

    def packed(self, family: Family, bits: int, dtype: DType) -> Parts:
        """After full-precision matrices have been packed."""

        def after(part: dict[str, Matrix]) -> dict[str, Matrix]:
            return packed_at_load(part, family, bits, dtype)

        layers = {index: after(layer) for index, layer in self.layers.items()}
        return Parts(after(self.embedding), after(self.inputs), after(self.norm), after(self.head), layers)


def bytes_of(tensors: Mapping[str, Matrix], backends: Iterable[Backend], dtype: DType) -> dict[Backend, int]:
    """What the tensors take in each engine's memory."""
    return {backend: sum(tensor.resident_bytes(backend, dtype) for tensor in tensors.values()) for backend in backends}


def most_bytes_of(tensors: Mapping[str, Matrix], backends: Iterable[Backend], dtype: DType) -> int:
    return max(bytes_of(tensors, backends, dtype).values())


def check_ends(parts: Parts, shape: Shape, tied: bool, where: str) -> None:
    """The first axis of each end is what the configuration says."""
    ends = [
        ("embedding", parts.embedding, shape.vocab_size, "vocab_size"),
        ("final norm", parts.norm, shape.hidden_size, "hidden_size"),
    ]
    if not tied:
        ends.append(("head", parts.head, shape.vocab_size, "vocab_size"))
    for name, tensors, extent, setting in ends:
        if "weight" not in tensors:
            raise ModelError(f"{where}: expected the weights of the {name}, found none; download the model again")
        found = tensors["weight"].shape
        if found[:1] != (extent,):
            raise ModelError(f"{where}: config.json gives {setting} {extent}, but the {name} has shape {list(found)}")


def check_inputs(parts: Parts, shape: Shape, where: str) -> None:
    """What makes layers' own inputs is there exactly when they have them, with a row for each token."""
    if not shape.input_width:
        parts.inputs.clear()
        return
    missing = [name for name in _INPUTS if name not in parts.inputs]
    if missing:
        raise ModelError(f"{where}: expected {', '.join(missing)} for the inputs of layers; download the model again")
    rows = parts.inputs[_INPUTS[0]].shape[0]
    if rows < shape.vocab_size:
        raise ModelError(f"{where}: {_INPUTS[0]} has {rows} rows for a vocabulary of {shape.vocab_size}")


def leave_out_extra(parts: Parts, shape: Shape, extra: object) -> None:
    """Forget the layers behind the last one that served training alone; no stage ever owns them."""
    count = extra if type(extra) is int else 0
    for index in [index for index in parts.layers if 0 <= index - shape.layer_count < count]:
        del parts.layers[index]
