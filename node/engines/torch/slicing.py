"""Building a stage's part of a `transformers` model: their code, our layers only.

The whole model is built on the meta device, where it costs no memory, and cut afterwards: fields of the
configuration that speak of absolute layer numbers stay true while the layers are built. Whatever the engine
cannot compute exactly is refused here, by name, before a byte of weights is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import assert_never

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from cluster.models.families import architecture_of, family_of
from cluster.models.layout import Embedding, Head, Layer, Norm, Unused, head_is_tied, part_of, within_layer
from cluster.types import LayerRange
from node.engine import StageSpec
from node.engines.torch import attention, latent, recurrent

_GENERATIVE = ("ForCausalLM", "ForConditionalGeneration")

_NOT_FROM_FILES = frozenset({"attn_implementation", "auto_map", "experts_implementation", "model_type"})

_LAYER_TYPES = frozenset({"conv", "full_attention", "linear_attention", "sliding_attention"})

_ROPE_TYPES = frozenset({"default", "linear", "llama3", "longrope", "proportional", "yarn"})
"""Rotations that depend on a token's position alone; `dynamic` looks at the longest row of a batch. `longrope` does
too, but not below the original context, and above it this engine does not go."""


class SlicedModel:
    """Layers [first, last) of a model, with the embedding, final norm and head that belong to them."""

    def __init__(self, model: torch.nn.Module, layers: LayerRange, layer_count: int, *, has_states: bool) -> None:
        self.model = model
        self.has_states = has_states  # in the whole model: stages have to treat sequences alike
        self.layers = layers
        self.is_first = layers.first == 0
        self.is_last = layers.last == layer_count

    @property
    def norm_name(self) -> str:
        """What the library calls the final norm."""
        return next(name for name in ("norm", "embedding_norm") if hasattr(self.model.model, name))

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    def local_name(self, stored: str) -> str:
        """The name in this slice of what the checkpoint calls `stored`: its layers count from zero, and the
        prefixes of vision-language checkpoints are gone."""
        part, rest = part_of(stored), within_layer(stored)
        match part:
            case Layer(index):
                return f"model.layers.{index - self.layers.first}.{rest}"
            case Embedding():
                return f"model.embed_tokens.{rest}"
            case Norm():
                return f"model.{self.norm_name}.{rest}"
            case Head():
                return f"lm_head.{rest}"
            case Unused():
                return stored
            case _:
                assert_never(part)

    def whole_name(self, local: str) -> str:
        """The name that a parameter of this slice has in the whole model, for messages."""
        part = part_of(local)
        return (
            f"model.layers.{part.index + self.layers.first}.{within_layer(local)}" if isinstance(part, Layer) else local
        )

    def hidden_states(self, source: torch.Tensor, positions: torch.Tensor, batch: attention.Batch) -> torch.Tensor:
        """[tokens] ids on the first stage, else [tokens, hidden]; returns what leaves the last owned layer."""
        output = self.model.model(**self._arguments(source, positions, batch))
        return output.last_hidden_state[0]

    def logits(
        self, source: torch.Tensor, positions: torch.Tensor, batch: attention.Batch, keep: torch.Tensor
    ) -> torch.Tensor:
        """[len(keep), vocabulary] after the packed tokens that `keep` names; their head, with its soft-cap."""
        output = self.model(**self._arguments(source, positions, batch), logits_to_keep=keep)
        return output.logits[0]

    def _arguments(self, source: torch.Tensor, positions: torch.Tensor, batch: attention.Batch) -> dict[str, object]:
        entrance = "input_ids" if self.is_first else "inputs_embeds"
        return {
            entrance: source[None],
            "position_ids": positions[None],
            "use_cache": False,
            attention.BATCH_KEYWORD: batch,
        }


def build_slice(checkpoint: Checkpoint, spec: StageSpec, dtype: torch.dtype, device: torch.device) -> SlicedModel:
    """The slice with buffers computed on `device` and parameters still on the meta device, to be loaded."""
    _refuse_checkpoint(checkpoint)
    family, text_config = family_of(checkpoint.config, str(checkpoint.folder))
    config = _parse(family.model_type, text_config)
    _refuse_config(config, spec)
    for setting in family.refused:  # once more, because the library's defaults are in it now
        if getattr(config, setting, None):
            raise ModelError(f"{setting} is {getattr(config, setting)!r}; Potluck runs {family.title} only without it")
    if getattr(config, "attn_logit_softcapping", None) is not None and not family.writes_scores:
        raise ModelError(f"{family.title} models have no attn_logit_softcapping; config.json asks for it")
    model = _build(config, dtype)
    _compute_buffers(model, device)  # before the cut, because some depend on the kinds of all layers
    latent.keep_latents(model)
    recurrent.run_rows_alone(model)
    sliced = SlicedModel(model, spec.layers, spec.layer_count, has_states=family.states is not None)
    _cut(sliced, head_is_tied(checkpoint))
    model.eval()
    return sliced


def _refuse_checkpoint(checkpoint: Checkpoint) -> None:
    for key in ("quantization_config", "quantization"):
        if checkpoint.config.get(key):
            raise ModelError(
                f"the checkpoint is quantised (config.json has {key!r}), which the torch engine does not unpack; "
                "run an MLX 4-bit checkpoint on MLX nodes, or choose the unquantised model"
            )
    name = architecture_of(checkpoint.config)
    if "architectures" in checkpoint.config and not name.endswith(_GENERATIVE):
        raise ModelError(f"config.json says {name}; expected a model that generates text ({', '.join(_GENERATIVE)})")


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


def _build(config: PretrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    try:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False
            )
    except Exception as error:  # see _parse
        raise ModelError(f"no model can be built from config.json: {error}") from error
    _keep_in_float32(model, dtype)
    return model


def _keep_in_float32(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the parts that the library never rounds their type, as its own loading would."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        for name, tensor in stored_tensors(module, recurse=False):
            if kept.intersection((*path.split("."), name)):
                wide = torch.empty_like(tensor, dtype=torch.float32)
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                setattr(module, name, torch.nn.Parameter(wide, requires_grad=False) if is_parameter else wide)


def stored_tensors(module: torch.nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that has to come from files: parameters, and buffers that are saved with them."""
    yield from module.named_parameters(recurse=recurse)
    for name, buffer in module.named_buffers(recurse=recurse):
        owner, _, last = name.rpartition(".")
        if last not in module.get_submodule(owner)._non_persistent_buffers_set:
            yield name, buffer


def _cut(sliced: SlicedModel, tied: bool) -> None:
    """Drop what the stage does not own, and count the layers that stay from zero, as our cache does."""
    model, layers = sliced.model, sliced.layers
    body = model.model
    body.layers = torch.nn.ModuleList(list(body.layers)[layers.first : layers.last])
    for index, layer in enumerate(body.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    types = getattr(model.config, "layer_types", None)
    if types:
        model.config.layer_types = list(types)[layers.first : layers.last]
    model.config.num_hidden_layers = len(layers)
    if not sliced.is_first:
        body.embed_tokens = None
    if not sliced.is_last:
        setattr(body, sliced.norm_name, torch.nn.Identity())
        model.lm_head = None
    elif tied and sliced.is_first:
        model.lm_head.weight = body.embed_tokens.weight
    else:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight, requires_grad=False)


def _compute_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Compute what is in no file (rotation frequencies, the embedding's scale) the way the library does.

    The parameters are still on the meta device, so the library's initialisation of them does nothing.
    """
    for path, module in model.named_modules():
        persistent = {name for name, _ in stored_tensors(module, recurse=False)}
        names = [
            name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta and name not in persistent
        ]
        for name in names:
            buffer = getattr(module, name)
            if not buffer.is_floating_point():
                raise ModelError(f"the torch engine does not know how to compute buffer {path}.{name}")
            setattr(module, name, torch.full(buffer.shape, torch.nan, dtype=buffer.dtype, device=device))
        if names:
            model._init_weights(module)
        for name in names:
            if getattr(module, name).isnan().any():
                raise ModelError(f"the torch engine does not know how to compute buffer {path}.{name}")
