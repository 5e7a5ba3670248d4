"""What a whole model computes when `mlx-lm` runs it in one process: the truth for `potluck verify` where
`transformers` cannot be it (machines without torch, or without room to unpack what MLX packed, and MLX's own formats).

Shares nothing with the MLX engine: mlx-lm loads the model and makes its caches itself. Only what mlx-lm overlooks
in newer configurations is put in its words, here and apart from the engine's translation, so that the two can
disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_config, load_model

from cluster.errors import ModelError
from cluster.models.facts import ModelFacts
from cluster.models.families import family_of
from cluster.models.quantising import GROUP, is_packed_at_load
from node.comparison import Floats, Trace, drawn_tokens
from node.engines.mlx.device import open_device
from node.hardware import Device


class _Recorder:
    """A layer that keeps what enters and leaves it; the model's loop may ask it anything that it asks a layer."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.entering: Any = None
        self.leaving: Any = None
        self.input: Any = None

    def __call__(self, x: mx.array, *args: object, **kwargs: object) -> Any:
        self.entering, self.input = x, kwargs.get("per_layer_input")
        returned = self._layer(x, *args, **kwargs)
        self.leaving = returned[0] if isinstance(returned, tuple) else returned
        return returned

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def trace_whole_model(folder: Path, facts: ModelFacts, tokens: tuple[int, ...], device: Device) -> Trace:
    """Run the model in `folder` on `tokens` in one forward, with mlx-lm's own caches."""
    with mx.stream(open_device(device.device)):
        model = _load(folder)
        if facts.bits is not None:
            _pack(model, facts.model_type, facts.bits)
        caches = make_prompt_cache(model)
        layers = getattr(model, "language_model", model).model.layers
        if len(layers) != facts.layer_count:
            raise ModelError(f"mlx-lm built {len(layers)} layers of this model; its files hold {facts.layer_count}")
        recorders = [_Recorder(layer) for layer in layers]
        layers[:] = recorders
        logits = model(mx.array([tokens]), cache=caches)[0, -drawn_tokens(len(tokens)) :]
        hidden = (recorders[0].entering, *(recorder.leaving for recorder in recorders))
        inputs = mx.stack([recorder.input[0] for recorder in recorders], axis=1) if len(facts.boundary) > 1 else None
        try:
            mx.eval(hidden, logits, inputs)
        except RuntimeError as error:
            raise ModelError(f"mlx-lm cannot compute {folder} in {facts.dtype} on {device.device}: {error}") from error
        own = None if inputs is None else _floats(inputs)
        return Trace(device, tokens, tuple(_floats(array)[0] for array in hidden), _floats(logits), own)


def _load(folder: Path) -> Any:
    try:
        config = load_config(folder)
        model, _ = load_model(folder, lazy=True, model_config=in_words_of_mlx_lm(config))
    except Exception as error:  # outside input meets a library that raises whatever it runs into
        raise ModelError(f"mlx-lm cannot load {folder}, so there is no reference: {error}") from error
    return model


def _pack(model: Any, model_type: str, bits: int) -> None:
    """Pack what the engines pack at load, by MLX's own means."""
    family, _ = family_of({"model_type": model_type}, "")

    def packs(path: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and is_packed_at_load(f"{path}.weight", module.weight.shape, family)

    with mx.stream(mx.cpu):  # where the engine packs too, whatever computes then
        nn.quantize(model, group_size=GROUP, bits=bits, class_predicate=packs)


def in_words_of_mlx_lm(config: Mapping[str, Any]) -> dict[str, object]:
    """What transformers 5 writes under names that mlx-lm reads past, under the names that it reads."""
    if isinstance(text_config := config.get("text_config"), dict):
        # The outer vocabulary wins there, and has a default of its own.
        vocabulary = {name: text_config[name] for name in text_config.keys() & {"vocab_size"}}
        return {"text_config": {**text_config, **in_words_of_mlx_lm(text_config)}, **vocabulary}
    words: dict[str, object] = {}
    if isinstance(by_layer := config.get("per_layer_config"), dict) and by_layer:
        wide = next(iter(by_layer.values()))
        words["global_head_dim"], words["num_global_key_value_heads"] = (
            wide["head_dim"],
            wide.get("num_key_value_heads"),
        )
    if "num_local_experts" in config:
        words["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return words
    if "partial_rotary_factor" in rope:
        words["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "linear_attention" in config.get("layer_types", ()):
        words["full_attention_interval"] = config["layer_types"].index("full_attention") + 1
    if isinstance(everywhere := rope.get("full_attention"), dict):
        words["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        words["sliding_window_pattern"] = config["layer_types"].index("full_attention") + 1
        rope = everywhere
    words["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        words["rope_scaling"] = rope
    if rope.get("rope_type") == "longrope":
        # mlx-lm always takes the long factors. Traced prompts are shorter than where these begin to hold.
        words["rope_scaling"] = {**rope, "type": "longrope", "long_factor": rope["short_factor"]}
    return words


def _floats(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32))
