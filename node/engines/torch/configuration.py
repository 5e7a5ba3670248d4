"""A text model's configuration in the words of `transformers`, and the refusal of what the engine cannot compute.

Everything that a configuration can ask for and that the attention function or the cache would get wrong is refused
here by name, with the library's own defaults filled in.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import AutoConfig, PretrainedConfig

from cluster.errors import ModelError
from cluster.models.family import Family
from node.engine import StageSpec

_NOT_FROM_FILES = frozenset({"attn_implementation", "auto_map", "experts_implementation", "model_type"})

_LAYER_TYPES = frozenset({"chunked_attention", "conv", "full_attention", "linear_attention", "sliding_attention"})

_ROPE_TYPES = frozenset({"default", "linear", "llama3", "longrope", "proportional", "yarn"})
"""Rotations that depend on a token's position alone; `dynamic` looks at the longest row of a batch. `longrope` does
too, but not below the original context, and above it this engine does not go."""


def read_config(family: Family, raw: Mapping[str, object], spec: StageSpec) -> PretrainedConfig:
    """The configuration `raw` of a text model; ModelError when it asks for something that is not computed exactly."""
    config = _parse(family.model_type, raw)
    _refuse_config(config, spec)
    for setting in family.refused:  # once more, because the library's defaults are in it now
        if getattr(config, setting, None):
            raise ModelError(f"{setting} is {getattr(config, setting)!r}; Potluck runs {family.title} only without it")
    if getattr(config, "attn_logit_softcapping", None) is not None and not family.writes_scores:
        raise ModelError(f"{family.title} models have no attn_logit_softcapping; config.json asks for it")
    return config


def _parse(model_type: str, raw: Mapping[str, object]) -> PretrainedConfig:
    # Keys that choose code (attention and expert implementations, remote classes) are ours to set, not the file's.
    fields = {key: value for key, value in raw.items() if not key.startswith("_") and key not in _NOT_FROM_FILES}
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # outside input meets a library that raises whatever it runs into
        raise ModelError(f"config.json is damaged or not of this model: {error}") from error
    # These would make the model collect what nobody reads.
    config.output_hidden_states = False
    config.output_attentions = False
    config.output_router_logits = False
    return config


def _refuse_config(config: PretrainedConfig, spec: StageSpec) -> None:
    layer_count = spec.layer_count
    if config.num_hidden_layers != layer_count:
        raise ModelError(f"the plan has {layer_count} layers; config.json says {config.num_hidden_layers}")
    types = getattr(config, "layer_types", None) or []
    if unknown := sorted(set(types) - _LAYER_TYPES):
        raise ModelError(f"the torch engine does not compute layers of type {', '.join(unknown)}")
    if types and len(types) != layer_count:
        raise ModelError(f"config.json lists {len(types)} layer_types for {layer_count} layers")
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):  # text is causal then
        raise ModelError(
            "the torch engine computes causal attention only; config.json asks for use_bidirectional_attention"
        )
    for rope in _rope_parameters(config):
        kind, original = rope.get("rope_type", "default"), rope.get("original_max_position_embeddings")
        if kind == "longrope" and not (isinstance(original, int) and spec.context_tokens <= original):
            raise ModelError(
                f"rotations of rope_type longrope change for all positions when a sequence passes {original} tokens; "
                f"the torch engine stops there, and the plan allows {spec.context_tokens}: ask for a shorter context"
            )
        if kind not in _ROPE_TYPES:
            raise ModelError(
                f"the torch engine does not compute rope_type {kind!r}: it knows {', '.join(sorted(_ROPE_TYPES))}"
            )


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, object]]:
    """One dictionary for all layers, or one for each layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]
