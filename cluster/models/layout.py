"""Which tensor belongs to which part of a model, told by its name.

Owns: the naming of the model families that Potluck runs. A stage owns whole parts: layers, and at the ends the
embedding, or the final norm and the head. Knows nothing of plans, sizes or engines.

Names are `model.embed_tokens.*`, `model.layers.N.*`, `model.norm.*` (LFM2 calls it `embedding_norm`, though it comes
last) and `lm_head.*`; the small Gemma 4 have three more in front of their layers. Vision-language checkpoints put
`language_model.` before, between or after (`language_model.model.layers.N`, `model.language_model.layers.N`);
everything else in them (vision towers, projectors) is unused, because Potluck runs the text model alone. Packed
checkpoints add tensors beside each weight, `.scales` for one; these follow it by name, and `cluster.models.matrices`
puts them together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.models.checkpoint import Checkpoint, StoredTensor
from cluster.types import LayerRange


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token ids to hidden states; also the head's weights when the head is tied."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer."""

    index: int


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Token ids to an input that each layer has for itself. Computed once, with the embedding at hand."""

    module: str


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm after the last layer."""


@dataclass(frozen=True, slots=True)
class Head:
    """Hidden states to logits."""


@dataclass(frozen=True, slots=True)
class Unused:
    """Nothing that a text model computes with."""


Part = Embedding | LayerInputs | Layer | Norm | Head | Unused

# Anchored: a vision tower also has `layers.3.`, behind a prefix of its own.
_NAME = re.compile(
    r"(?:(?:model|language_model)\.)*"
    r"(?:(?P<end>embed_tokens|norm|embedding_norm|lm_head)"
    r"|(?P<inputs>embed_tokens_per_layer|per_layer_model_projection|per_layer_projection_norm)"
    r"|layers\.(?P<layer>0|[1-9][0-9]{0,5}))\.(?P<rest>.+)"
)
# What a layer that attends to the keys of an earlier one is stored with all the same, and never uses.
_OWN_KEYS = ("self_attn.k_proj.", "self_attn.v_proj.", "self_attn.k_norm.", "self_attn.v_norm.")
# Old Llama checkpoints store what every engine computes itself.
_COMPUTED = re.compile(r"(?:.+\.)?rotary_emb\.inv_freq")


def part_of(name: str) -> Part:
    """The part that the tensor called `name` belongs to."""
    match = _NAME.fullmatch(name)
    if match is None or _COMPUTED.fullmatch(match["rest"]):
        return Unused()
    if match["inputs"]:
        return LayerInputs(match["inputs"])
    match match["end"]:
        case "embed_tokens":
            return Embedding()
        case "norm" | "embedding_norm":
            return Norm()
        case "lm_head":
            return Head()
        case _:
            return Layer(int(match["layer"]))


def within_layer(name: str) -> str:
    """A layer tensor's name without its layer: `self_attn.q_proj.weight`."""
    match = _NAME.fullmatch(name)
    return match["rest"] if match else name


def canonical_name(name: str) -> str:
    """The name that a text model's tensor has when nothing is wrapped around the model."""
    match part_of(name):
        case Layer(index):
            return f"model.layers.{index}.{within_layer(name)}"
        case Embedding():
            return f"model.embed_tokens.{within_layer(name)}"
        case LayerInputs(module):
            return f"model.{module}.{within_layer(name)}"
        case Norm():
            # LFM2 calls it so, though it comes last; mlx-lm as well.
            norm = "embedding_norm" if "embedding_norm." in name else "norm"
            return f"model.{norm}.{within_layer(name)}"
        case Head():
            return f"lm_head.{within_layer(name)}"
        case _:
            return name


def is_expert(inner: str) -> bool:
    """Whether a tensor, by its name within a layer, belongs to experts: these lie singly or stacked in transformers'
    files (`experts.`), stacked in MLX's (`switch_mlp.`)."""
    return inner.removeprefix("mlp.").removeprefix("feed_forward.").startswith(("experts.", "switch_mlp."))


def head_is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head computes with the embedding's weights.

    The configuration decides; the outer one first, as transformers reads it. One that is silent (families differ
    in what silence means) is tied exactly when no head is stored. A stored head of a tied model is unused.
    """
    inner = checkpoint.config.get("text_config")
    for config in (checkpoint.config, inner if isinstance(inner, dict) else {}):
        tied = config.get("tie_word_embeddings")
        if isinstance(tied, bool):
            return tied
    return not any(isinstance(part_of(name), Head) for name in checkpoint.tensors)


def is_own_key(name: str) -> bool:
    """Whether a layer's tensor of this name within it makes keys or values."""
    return name.startswith(_OWN_KEYS)


def is_spare(name: str, layer_count: int, sharing: int) -> bool:
    """Whether the tensor called `name` would make keys or values in one of the last `sharing` layers, which attend to
    those of earlier layers instead."""
    part = part_of(name)
    return isinstance(part, Layer) and part.index >= layer_count - sharing and is_own_key(within_layer(name))


def sharing_layers(config: Mapping[str, object]) -> int:
    """How many layers at the end attend to keys and values of earlier ones, by a model's or a text configuration."""
    inner = config.get("text_config")
    found = (inner if isinstance(inner, dict) else config).get("num_kv_shared_layers")
    return found if type(found) is int and found > 0 else 0


def owned_tensors(checkpoint: Checkpoint, layers: LayerRange, layer_count: int) -> tuple[StoredTensor, ...]:
    """The tensors that the stage with `layers` needs, in the order in which they lie in the files.

    The embedding goes with the first layer, and with the last one too when the head is tied; what makes layers' own
    inputs goes with the first, the final norm and the head with the last layer.
    """
    is_first, is_last = layers.first == 0, layers.last == layer_count
    tied, sharing = head_is_tied(checkpoint), sharing_layers(checkpoint.config)

    def owns(part: Part) -> bool:
        match part:
            case Embedding():
                return is_first or (is_last and tied)
            case LayerInputs():
                return is_first
            case Layer(index):
                return index in layers
            case Norm():
                return is_last
            case Head():
                return is_last and not tied
            case Unused():
                return False

    owned = (
        tensor
        for tensor in checkpoint.tensors.values()
        if owns(part_of(tensor.name)) and not is_spare(tensor.name, layer_count, sharing)
    )
    return tuple(sorted(owned, key=lambda tensor: (tensor.file, tensor.begin, tensor.name)))
