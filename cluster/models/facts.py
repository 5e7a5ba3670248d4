"""What a model costs: bytes of every layer at rest, in memory, for each token, and what a boundary carries.

Owns: turning a checkpoint's headers and configuration into the numbers that placement computes with, and the
refusal of checkpoints whose files and configuration disagree. Reads no weights and knows nothing of nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from cluster.models.cuts import keys_of, legal_cuts
from cluster.models.families import architecture_of, engines_for, family_of
from cluster.models.family import Attention, Family
from cluster.models.formats import READERS, Packing, Quantization, read_quantization
from cluster.models.layout import Unused, head_is_tied, is_expert, is_own_key, is_spare, part_of
from cluster.models.matrices import Matrix, read_matrices, readers_of
from cluster.models.parts import Parts, bytes_of, check_ends, check_inputs, leave_out_extra, most_bytes_of
from cluster.models.quantising import GROUP, bits_to_pack
from cluster.models.shape import Shape, read_shape
from cluster.models.windows import kept_positions, read_windows
from cluster.rewinding import EXACT, Rewind, rewind_of
from cluster.types import Backend, DType, Format, TensorSpec

_COMPUTE_DTYPES = frozenset({DType.F32, DType.BF16, DType.F16})


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One decoder layer's cost."""

    resident_bytes: Mapping[Backend, int]  # in memory; an engine that unpacks a format needs more than is stored
    streamed_bytes: int  # weights read for one token: of the experts only those that it uses
    kv_bytes_per_token: int
    state_bytes: int = 0  # for each sequence, however long it is
    kv_tokens_max: int | None = None  # positions kept of a sequence where the layer looks back a window; None: all


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
    inputs_bytes: int = 0  # what makes layers' own inputs: resident with the first layer
    inputs_streamed_bytes: int = 0  # of these, what is no lookup
    heads: int = 0  # of queries
    experts_used: int = 0  # for each token; 0 without experts
    extra_copies: int = 0  # of the MLP's inner state, which the family's layers hold at once beyond the usual ones
    whole_scores: bool = False  # MLX writes the scores of a whole chunk
    scores_heads: int = 0  # heads whose scores are written to memory: soft-caps and sinks; 0 where attention is fused
    rewind: Rewind = EXACT  # where sequences can be cut back to, as engines say it too

    @property
    def format(self) -> str:
        """How the weights are held, for people."""
        made = "" if self.bits is None else ", made at load"
        return self.dtype.value if self.quantization is None else f"{self.quantization}{made}"

    @property
    def stored_bytes(self) -> int:
        """All weights that the model computes with, once."""
        layers = sum(max(layer.resident_bytes.values()) for layer in self.layers)
        return (
            layers + self.embedding_bytes + self.inputs_bytes + self.norm_bytes + (0 if self.tied else self.head_bytes)
        )


def read_facts(checkpoint: Checkpoint, bits: int | None = None) -> ModelFacts:
    """The facts of `checkpoint`, packed in `bits` when it is loaded; ModelError when its architecture is not supported,
    its files are not whole or it is packed already."""
    where = str(checkpoint.folder)
    family, config = family_of(checkpoint.config, where)
    shape = read_shape(family, config, where)
    quantization = read_quantization(checkpoint.config, where)
    tied = head_is_tied(checkpoint)
    sources = keys_of(config, shape.layer_count, shape.sharing_layers, where)
    used = [
        tensor
        for tensor in checkpoint.tensors.values()
        if not isinstance(part_of(tensor.name), Unused)
        and not is_spare(tensor.name, shape.layer_count, shape.sharing_layers)
    ]
    matrices = read_matrices(used, quantization, where)
    parts = Parts.of(matrices)
    leave_out_extra(parts, shape, config.get(family.extra_layers or ""))
    check_ends(parts, shape, tied, where)
    check_inputs(parts, shape, where)
    _check_layers(parts, shape, family, where)
    stated = {quantization.kind} if quantization else set()
    dtype = _compute_dtype(parts, where)
    bits = bits_to_pack(bits, quantization, where)
    if bits is not None:
        parts = parts.packed(family, bits, dtype)
    able = engines_for(family, config)
    backends = _backends(family, able, parts.packings | stated, readers_of(matrices.values()), where)
    embedding_bytes = most_bytes_of(parts.embedding, backends, dtype)
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
            replace(_layer_facts(parts.layers[index], shape, family, dtype, backends), kv_tokens_max=tokens)
            for index, tokens in enumerate(kept_positions(family, config, shape.layer_count, where))
        ),
        embedding_bytes=embedding_bytes,
        head_bytes=embedding_bytes if tied else most_bytes_of(parts.head, backends, dtype),
        norm_bytes=most_bytes_of(parts.norm, backends, dtype),
        attention_width=_attention_width(parts, shape, family),
        mlp_width=_mlp_width(parts, shape, family),
        formats=parts.formats,
        bits=bits,
        legal_cuts=legal_cuts(sources),
        boundary=_boundary(shape, dtype),
        inputs_bytes=most_bytes_of(parts.inputs, backends, dtype),
        inputs_streamed_bytes=parts.inputs_streamed_bytes,
        heads=shape.heads,
        experts_used=shape.experts_used,
        extra_copies=family.extra_copies,
        whole_scores=family.whole_scores,
        scores_heads=shape.heads if family.writes_scores else 0,
        rewind=rewind_of(read_windows(family, config, shape.layer_count, where), has_states=family.states is not None),
    )


def _mlp_width(parts: Parts, shape: Shape, family: Family) -> int:
    """Where all layers have experts, configurations state the width of a dense MLP that no layer has."""
    has_dense = any(family.dense_mlp[-1] in tensors for tensors in parts.layers.values())
    return max(shape.experts_width, shape.dense_width if has_dense else 0)


def _boundary(shape: Shape, dtype: DType) -> tuple[TensorSpec, ...]:
    """All layers' own inputs travel with the hidden states: making them needs the embedding and a table many times its
    size, which are on the first stage."""
    hidden = TensorSpec("hidden", (shape.hidden_size,), dtype)
    own = TensorSpec("layer_inputs", (shape.layer_count, shape.input_width), dtype)
    return (hidden, own) if shape.input_width else (hidden,)


def _backends(
    family: Family, able: frozenset[Backend], packings: frozenset[Packing], readers: frozenset[Backend], where: str
) -> frozenset[Backend]:
    """Engines that compute the family exactly and read every matrix that its files hold."""
    backends = readers.intersection(able, *(READERS[packing] for packing in packings))
    if not backends:
        format_name = " and ".join(sorted(packings - {Packing.NONE})) or "full precision"
        runs_on = " and ".join(sorted(able)) or "no engine"
        raise ModelError(
            f"{where}: no engine runs {family.title} stored as {format_name}; {runs_on} computes this model in full "
            "precision. Use another version of it"
        )
    return backends


def _check_layers(parts: Parts, shape: Shape, family: Family, where: str) -> None:
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
            *(family.input_tensors if shape.input_width else ()),
        )
        shares = index >= shape.layer_count - shape.sharing_layers
        missing_names = [name for name in needed if name not in tensors and not (shares and is_own_key(name))]
        if missing_names:
            raise ModelError(
                f"{where}: layer {index} lacks {', '.join(missing_names)}; download the model again, or it is no "
                f"{family.title}"
            )
        if has_state or shares:
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


def _compute_dtype(parts: Parts, where: str) -> DType:
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
        # Those that attend to the keys of others keep none.
        cache_width = 2 * _rows(tensors, family.attention.tensors[0])
    if family.states is not None and _has_state(tensors, family):
        state_bytes = prod(tensors[family.states.window].shape) * dtype.size_bytes
        state_bytes += shape.memory * DType.F32.size_bytes
    return LayerFacts(
        resident_bytes=bytes_of(tensors, backends, dtype),
        streamed_bytes=stored - experts + used,
        kv_bytes_per_token=0 if state_bytes else cache_width * dtype.size_bytes,
        state_bytes=state_bytes,
    )


def _attention_width(parts: Parts, shape: Shape, family: Family) -> int:
    """As the configuration gives it, or as wide as the widest layer's matrices make it."""
    if family.attention is not Attention.VARIED:
        return shape.attention_width
    keys, queries, *_ = family.attention.tensors
    return max(_rows(layer, queries) + 2 * _rows(layer, keys) for layer in parts.layers.values())


def _rows(tensors: Mapping[str, Matrix], name: str) -> int:
    return tensors[name].shape[0] if name in tensors else 0


def _has_state(tensors: Mapping[str, Matrix], family: Family) -> bool:
    return family.states is not None and any(name.startswith(family.states.prefix) for name in tensors)
