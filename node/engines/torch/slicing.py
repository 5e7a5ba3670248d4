"""Building a stage's part of a `transformers` model: their code, our layers only.

The whole model is built on the meta device, where it costs no memory, and cut afterwards: fields of the
configuration that speak of absolute layer numbers stay true while the layers are built. Whatever the engine
cannot compute exactly is refused here, by name, before a byte of weights is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from cluster.models.families import architecture_of, family_of
from cluster.models.layout import (
    Embedding,
    Head,
    Layer,
    LayerInputs,
    Norm,
    Unused,
    head_is_tied,
    part_of,
    within_layer,
)
from cluster.models.windows import read_windows
from cluster.rewinding import rewind_of
from cluster.types import LayerRange
from node.engine import StageSpec
from node.engines.torch import attention, chunked, latent, recurrent, shared
from node.engines.torch.configuration import read_config
from node.engines.torch.inputs import InputMaker, takes_inputs

_GENERATIVE = ("ForCausalLM", "ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class Passing:
    """What goes from one layer to the next, over a boundary where a stage ends between them."""

    hidden: torch.Tensor  # [tokens, hidden]
    inputs: torch.Tensor | None = None  # [tokens, all layers, width] where layers have inputs of their own

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.hidden,) if self.inputs is None else (self.hidden, self.inputs)


class SlicedModel:
    """Layers [first, last) of a model, with the embedding, final norm and head that belong to them."""

    def __init__(
        self, model: torch.nn.Module, layers: LayerRange, windows: Sequence[int | None], *, has_states: bool
    ) -> None:
        self.model = model
        self.windows = windows[layers.first : layers.last]  # how far back each owned layer looks
        self.rewind = rewind_of(windows, has_states=has_states)
        self.layers = layers
        self.is_first = layers.first == 0
        self.is_last = layers.last == len(windows)
        self._inputs: InputMaker | None = None

    @property
    def norm_name(self) -> str:
        """What the library calls the final norm."""
        return next(name for name in ("norm", "embedding_norm") if hasattr(self.model.model, name))

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    def boundary_shapes(self, layer_count: int) -> list[tuple[int, ...]]:
        """Of what goes from one layer to the next, for each token."""
        width = getattr(self.model.config, "hidden_size_per_layer_input", 0)
        return [(self.hidden_size,), (layer_count, width)] if takes_inputs(self.model) else [(self.hidden_size,)]

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
            case LayerInputs(module):
                return f"model.{module}.{rest}"
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

    def enter(self, ids: torch.Tensor) -> Passing:
        """What enters layer 0, of [tokens] ids; on the first stage alone."""
        embedded = self.model.model.embed_tokens(ids[None])
        inputs = None if self._inputs is None else self._inputs.make(ids[None], embedded)[0]
        return Passing(embedded[0], inputs)

    def hidden_states(self, entering: Passing, positions: torch.Tensor, batch: attention.Batch) -> Passing:
        """What leaves the last owned layer."""
        output = self.model.model(**self._arguments(entering, positions, batch))
        return Passing(output.last_hidden_state[0], entering.inputs)

    def logits(
        self, entering: Passing, positions: torch.Tensor, batch: attention.Batch, keep: torch.Tensor
    ) -> torch.Tensor:
        """[len(keep), vocabulary] after the packed tokens that `keep` names; their head, with its soft-cap."""
        output = self.model(**self._arguments(entering, positions, batch), logits_to_keep=keep)
        return output.logits[0]

    def _arguments(self, entering: Passing, positions: torch.Tensor, batch: attention.Batch) -> dict[str, object]:
        arguments: dict[str, object] = {
            "inputs_embeds": entering.hidden[None],
            "position_ids": positions[None],
            "use_cache": False,
            attention.BATCH_KEYWORD: batch,
        }
        if self._inputs is not None and entering.inputs is not None:
            arguments["per_layer_inputs"] = self._inputs.owned(entering.inputs[None])
        return arguments

    def cut_inputs(self) -> None:
        """Where layers have inputs of their own: keep what makes them on the first stage alone."""
        if takes_inputs(self.model):
            self._inputs = InputMaker(self.model.model, self.layers)


def build_slice(checkpoint: Checkpoint, spec: StageSpec, dtype: torch.dtype, device: torch.device) -> SlicedModel:
    """The slice with buffers computed on `device` and parameters still on the meta device, to be loaded."""
    _refuse_checkpoint(checkpoint)
    family, text_config = family_of(checkpoint.config, str(checkpoint.folder))
    config = read_config(family, text_config, spec)
    model = _build(config, dtype)
    _compute_buffers(model, device)  # before the cut, because some depend on the kinds of all layers
    latent.keep_latents(model)
    recurrent.run_rows_alone(model)
    chunked.prepare(model)
    windows = read_windows(family, text_config, spec.layer_count, str(checkpoint.folder))
    sliced = SlicedModel(model, spec.layers, windows, has_states=family.states is not None)
    _cut(sliced, head_is_tied(checkpoint))
    model.eval()
    return sliced


def _refuse_checkpoint(checkpoint: Checkpoint) -> None:
    name = architecture_of(checkpoint.config)
    if "architectures" in checkpoint.config and not name.endswith(_GENERATIVE):
        raise ModelError(f"config.json says {name}; expected a model that generates text ({', '.join(_GENERATIVE)})")


def _build(config: PretrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    try:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False
            )
    except Exception as error:  # see read_config
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
    shared.refuse_parted(body.layers.modules())
    types = getattr(model.config, "layer_types", None)
    if types:
        model.config.layer_types = list(types)[layers.first : layers.last]
    sliced.cut_inputs()
    if not takes_inputs(model):  # what makes these counts all layers
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
