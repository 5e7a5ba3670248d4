"""What a model costs: bytes of every layer at rest, in memory, for each token, and what a boundary carries.

Owns: turning a checkpoint's headers and configuration into the numbers that placement computes with, and the
refusal of checkpoints whose files and configuration disagree. Reads no weights and knows nothing of nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from cluster.models.families import architecture_of, engines_for, family_of
from cluster.models.family import Attention, Family
from cluster.models.formats import HALF_EXPERTS, READERS, Packing, Quantization, read_quantization
from cluster.models.layout import Embedding, Head, Layer, Norm, Unused, head_is_tied, is_expert, part_of, within_layer
from cluster.models.matrices import Matrix, read_matrices
from cluster.models.quantising import GROUP, bits_to_pack, packed_at_load
from cluster.models.shape import Shape, read_shape
from cluster.types import Backend, DType, Format, TensorSpec

_HALF = frozenset({DType.BF16, DType.F16})
_COMPUTE_DTYPES = _HALF | {DType.F32}


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One decoder layer's cost."""

    resident_bytes: Mapping[Backend, int]  # in memory; an engine that unpacks a format needs more than is stored
    streamed_bytes: int  # weights read for one token: of the experts only those that it uses
    kv_bytes_per_token: int
    state_bytes: int = 0  # for each sequence, however long it is


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Everything that placement needs to know of a model."""

    architecture: str
    model_type: str
    layer_count: int
    hidden_size: int
    vocab_size: int
    context_tokens: int  # the longest sequence that the model was made for
    dtype: DType  # as stored, which is what engines compute in and what the cache holds
    tied: bool  # the head computes with the embedding's weights
    quantization: Quantization | None
    backends: frozenset[Backend]  # the engines that can run it
    layers: tuple[LayerFacts, ...]
    embedding_bytes: int  # resident with the first layer; a lookup, so it costs no time
    head_bytes: int  # resident with the last layer and streamed there; the embedding's bytes once more when tied
    norm_bytes: int  # the final norm, with the last layer
    attention_width: int  # elements of queries, keys and values for each token
    mlp_width: int  # elements of the MLP's inner state for each token, in the widest layer
    legal_cuts: frozenset[int]  # layers at which a stage may begin; 0 is one
    boundary: tuple[TensorSpec, ...]  # what a layer needs from the one before, for each token
    formats: frozenset[Format] = frozenset()  # what an engine has to read to run it
    bits: int | None = None  # what nodes pack it in while they load it; None: it stays as it is stored
    scores_heads: int = 0  # heads whose scores are written to memory: soft-caps and sinks; 0 where attention is fused

    @property
    def format(self) -> str:
        """How the weights are held, for people."""
        made = "" if self.bits is None else ", made at load"
        return self.dtype.value if self.quantization is None else f"{self.quantization}{made}"

    @property
    def stored_bytes(self) -> int:
        """All weights that the model computes with, once."""
        layers = sum(max(layer.resident_bytes.values()) for layer in self.layers)
        return layers + self.embedding_bytes + self.norm_bytes + (0 if self.tied else self.head_bytes)


def read_facts(checkpoint: Checkpoint, bits: int | None = None) -> ModelFacts:
    """The facts of `checkpoint`, packed in `bits` when it is loaded; ModelError when its architecture is not supported,
    its files are not whole or it is packed already."""
    where = str(checkpoint.folder)
    family, config = family_of(checkpoint.config, where)
    shape = read_shape(family, config, where)
    quantization = read_quantization(checkpoint.config, where)
    tied = head_is_tied(checkpoint)
    used = [tensor for tensor in checkpoint.tensors.values() if not isinstance(part_of(tensor.name), Unused)]
    parts = _Parts.of(read_matrices(used, quantization, where))
    _leave_out_extra(parts, shape, config.get(family.extra_layers or ""))
    _check_ends(parts, shape, tied, where)
    _check_layers(parts, shape, family, where)
    stated = {quantization.kind} if quantization else set()
    dtype = _compute_dtype(parts, where)
    bits = bits_to_pack(bits, quantization, where)
    if bits is not None:
        parts = parts.packed(family, bits, dtype)
    backends = _backends(family, config, parts.packings | stated, where)
    embedding_bytes = _most_bytes_of(parts.embedding, backends, dtype)
    return ModelFacts(
        architecture=architecture_of(checkpoint.config),
        model_type=family.model_type,
        layer_count=shape.layer_count,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        context_tokens=shape.context_tokens,
        dtype=dtype,
        tied=tied,
        quantization=Quantization(Packing.AFFINE, bits, GROUP) if bits else quantization,
        backends=backends,
        layers=tuple(
            _layer_facts(parts.layers[index], shape, family, dtype, backends) for index in range(shape.layer_count)
        ),
        embedding_bytes=embedding_bytes,
        head_bytes=embedding_bytes if tied else _most_bytes_of(parts.head, backends, dtype),
        norm_bytes=_most_bytes_of(parts.norm, backends, dtype),
        attention_width=_attention_width(parts, shape, family),
        mlp_width=shape.mlp_width,
        legal_cuts=frozenset(range(shape.layer_count)),  # no supported family shares state between layers
        boundary=(TensorSpec("hidden", (shape.hidden_size,), dtype),),
        formats=parts.formats,
        bits=bits,
        scores_heads=shape.heads if family.writes_scores else 0,
    )


def _backends(
    family: Family, config: Mapping[str, object], packings: frozenset[Packing], where: str
) -> frozenset[Backend]:
    """Engines that compute the family exactly and read every format that its files hold."""
    able = engines_for(family, config)
    backends = able.intersection(*(READERS[packing] for packing in packings))
    if not backends:
        format_name = " and ".join(sorted(packings - {Packing.NONE})) or "full precision"
        runs_on = " and ".join(sorted(able)) or "no engine"
        raise ModelError(
            f"{where}: no engine runs {family.title} stored as {format_name}; {runs_on} computes this model in full "
            "precision. Use another version of it"
        )
    return backends


@dataclass(frozen=True, slots=True)
class _Parts:
    """The checkpoint's matrices by part; those of a layer by their name within it."""

    embedding: dict[str, Matrix]
    norm: dict[str, Matrix]
    head: dict[str, Matrix]
    layers: dict[int, dict[str, Matrix]]

    @classmethod
    def of(cls, matrices: Mapping[str, Matrix]) -> _Parts:
        parts = cls({}, {}, {}, defaultdict(dict))
        for tensor in matrices.values():
            name = within_layer(tensor.name)
            match part_of(tensor.name):
                case Embedding():
                    parts.embedding[name] = tensor
                case Norm():
                    parts.norm[name] = tensor
                case Head():
                    parts.head[name] = tensor
                case Layer(index):
                    parts.layers[index][name] = tensor
        return parts

    @property
    def packings(self) -> frozenset[Packing]:
        parts = (self.embedding, self.norm, self.head, *self.layers.values())
        return frozenset(tensor.packing for part in parts for tensor in part.values())

    @property
    def formats(self) -> frozenset[Format]:
        has_half_experts = any(
            is_expert(name) and not name.endswith("bias") and matrix.packing is Packing.NONE and matrix.dtype in _HALF
            for layer in self.layers.values()
            for name, matrix in layer.items()
        )
        return frozenset(map(Format, self.packings)) | ({HALF_EXPERTS} if has_half_experts else set())

    def packed(self, family: Family, bits: int, dtype: DType) -> _Parts:
        """After full-precision matrices have been packed."""

        def after(part: dict[str, Matrix]) -> dict[str, Matrix]:
            return packed_at_load(part, family, bits, dtype)

        layers = {index: after(layer) for index, layer in self.layers.items()}
        return _Parts(after(self.embedding), after(self.norm), after(self.head), layers)


def _bytes_of(tensors: Mapping[str, Matrix], backends: Iterable[Backend], dtype: DType) -> dict[Backend, int]:
    """What the tensors take in each engine's memory."""
    return {backend: sum(tensor.resident_bytes(backend, dtype) for tensor in tensors.values()) for backend in backends}


def _most_bytes_of(tensors: Mapping[str, Matrix], backends: Iterable[Backend], dtype: DType) -> int:
    return max(_bytes_of(tensors, backends, dtype).values())


def _check_ends(parts: _Parts, shape: Shape, tied: bool, where: str) -> None:
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


def _leave_out_extra(parts: _Parts, shape: Shape, extra: object) -> None:
    """Forget the layers behind the last one that served training alone; no stage ever owns them."""
    count = extra if type(extra) is int else 0
    for index in [index for index in parts.layers if 0 <= index - shape.layer_count < count]:
        del parts.layers[index]


def _check_layers(parts: _Parts, shape: Shape, family: Family, where: str) -> None:
    if len(parts.layers) != shape.layer_count or max(parts.layers) != shape.layer_count - 1:
        missing = [index for index in range(shape.layer_count) if index not in parts.layers]
        detail = f"layer {missing[0]} is missing" if missing else f"they go up to layer {max(parts.layers)}"
        raise ModelError(
            f"{where}: config.json gives {shape.layer_count} layers, but the files hold {len(parts.layers)}: {detail}; "
            "download the model again"
        )
    for index, tensors in parts.layers.items():
        has_experts = family.has_experts and any(is_expert(name) for name in tensors)
        has_state = _has_state(tensors, family)
        needed = (
            *((family.states.window, *family.norms) if has_state and family.states else family.layer_tensors),
            *((family.router or "",) if has_experts else family.dense_mlp),
        )
        missing_names = [name for name in needed if name not in tensors]
        if missing_names:
            raise ModelError(
                f"{where}: layer {index} lacks {', '.join(missing_names)}; download the model again, or it is no "
                f"{family.title}"
            )
        if has_state:
            continue
        keys, rows = tensors[family.attention.tensors[0]].shape, shape.key_rows(family.attention)
        if rows is None:  # then the norm of keys tells how large a head is
            if keys[0] % prod(tensors["self_attn.k_norm.weight"].shape) == 0:
                continue
            raise ModelError(f"{where}: layer {index} has keys of shape {list(keys)}, which are no whole heads")
        if keys[:1] != (rows,):
            raise ModelError(
                f"{where}: config.json gives {shape.kv_heads} key heads of {shape.head_dim}, but layer {index} has "
                f"keys of shape {list(keys)} where {rows} rows follow from it"
            )


def _compute_dtype(parts: _Parts, where: str) -> DType:
    """What the embedding yields: its own type, its scales' when it is packed, the norm's when those are packed too."""
    for matrix in (parts.embedding["weight"], parts.norm["weight"]):
        if matrix.dtype in _COMPUTE_DTYPES:
            return matrix.dtype
    raise ModelError(
        f"{where}: the embedding is stored as {parts.embedding['weight'].dtype}; expected "
        f"{', '.join(sorted(_COMPUTE_DTYPES))}, or a packed format. Use another version of this model"
    )


def _layer_facts(
    tensors: Mapping[str, Matrix], shape: Shape, family: Family, dtype: DType, backends: Iterable[Backend]
) -> LayerFacts:
    stored = sum(tensor.stored_bytes for tensor in tensors.values())
    experts = sum(tensor.stored_bytes for name, tensor in tensors.items() if is_expert(name))
    used = -(-experts * shape.experts_used // shape.experts) if experts else 0
    cache_width, state_bytes = shape.cache_width, 0
    if family.attention is Attention.VARIED:
        cache_width = 2 * tensors[family.attention.tensors[0]].shape[0]
    if family.states is not None and _has_state(tensors, family):
        state_bytes = prod(tensors[family.states.window].shape) * dtype.size_bytes
        state_bytes += shape.memory * DType.F32.size_bytes
    return LayerFacts(
        resident_bytes=_bytes_of(tensors, backends, dtype),
        streamed_bytes=stored - experts + used,
        # In full for layers with a sliding window too: the engines keep every position for now.
        kv_bytes_per_token=0 if state_bytes else cache_width * dtype.size_bytes,
        state_bytes=state_bytes,
    )


def _attention_width(parts: _Parts, shape: Shape, family: Family) -> int:
    """As the configuration gives it, or as wide as the widest layer's matrices make it."""
    if family.attention is not Attention.VARIED:
        return shape.attention_width
    keys, queries, *_ = family.attention.tensors
    return max(layer[queries].shape[0] + 2 * layer[keys].shape[0] for layer in parts.layers.values())


def _has_state(tensors: Mapping[str, Matrix], family: Family) -> bool:
    return family.states is not None and any(name.startswith(family.states.prefix) for name in tensors)
