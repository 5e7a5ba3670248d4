"""The single-process reference for MLX: the whole model by `mlx-lm`, with its own caches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tests.oracle.reference import LAST_TOKENS, Reference, decisive_reference

MLX_TOLERANCE = 1e-4
"""Largest allowed difference of two float32 logits when both are computed by MLX: only the order of summation in
a batch may differ."""


class WholeMlxModel:
    """The model in `folder` as `mlx-lm` runs it in one process."""

    def __init__(self, folder: Path) -> None:
        self.stated = _as_mlx_lm_reads_it(folder)
        self._model: Any
        self._model, _ = load_model(as_mlx_lm_stores_it(folder), model_config=dict(self.stated))

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """After each token, in one forward."""
        return self._forward(tokens, make_prompt_cache(self._model))

    def greedy(self, prompt: Sequence[int], count: int) -> Reference:
        """A greedy continuation; end-of-sequence ids do not end it."""
        caches = make_prompt_cache(self._model)
        logits = [self._forward(prompt, caches)[-1]]
        ids = [int(logits[-1].argmax())]
        while len(ids) < count:
            logits.append(self._forward(ids[-1:], caches)[-1])
            ids.append(int(logits[-1].argmax()))
        return Reference(list(prompt), ids, np.stack(logits), judge="mlx-lm")

    def _forward(self, tokens: Sequence[int], caches: list[Any]) -> npt.NDArray[np.float32]:
        return np.array(self._model(mx.array([list(tokens)]), cache=caches)[0].astype(mx.float32))


@cache
def whole_mlx_model(folder: Path) -> WholeMlxModel:
    return WholeMlxModel(folder)


@cache
def mlx_reference(folder: Path, prompt_tokens: int = 40) -> Reference:
    """A decisive greedy continuation by the whole model of a prompt with so many tokens."""
    model: Any = whole_mlx_model(folder)
    return decisive_reference(model, prompt_tokens=prompt_tokens, count=LAST_TOKENS + 4, tolerance=MLX_TOLERANCE)


def _as_mlx_lm_reads_it(folder: Path) -> dict[str, object]:
    """What transformers 5 writes and mlx-lm overlooks, in mlx-lm's words. Written for the tests' checkpoints alone
    and apart from the engine's own translation, so that the two can disagree."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    words: dict[str, object] = {}
    if "full_attention" in rope:
        words["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    words["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        words["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "linear_attention" in config.get("layer_types", ()):
        words["full_attention_interval"] = config["layer_types"].index("full_attention") + 1
    if config["model_type"] in ("qwen3_5_text", "qwen3_5_moe_text"):
        words["model_type"] = config["model_type"].removesuffix("_text")
    if config["model_type"] == "lfm2":
        words["block_dim"] = config["hidden_size"]
    if "per_layer_config" in config:
        wide = next(iter(config["per_layer_config"].values()))
        words["global_head_dim"], words["num_global_key_value_heads"] = (
            wide["head_dim"],
            wide.get("num_key_value_heads"),
        )
    if "num_local_experts" in config:
        words["num_experts"] = config["num_local_experts"]
    if rope["rope_type"] != "default":
        words["rope_scaling"] = rope
    if config["model_type"] == "llama4_text":  # a whole model of it is the vision-language one
        return {"model_type": "llama4", "text_config": {"rope_scaling": None, **config, **words}}
    return words


@cache
def as_mlx_lm_stores_it(folder: Path) -> Path:
    """The same folder, or for gpt-oss another: mlx-lm reads transformers' files of it only when they are packed; or for
    Qwen3.5 with experts and Llama 4, which it reads only as they were published. transformers' files of gpt-oss have
    experts as [in, out] with gate and up in turns; here they are [out, in] and apart."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "qwen3_5_moe_text":
        return experts_in_stacks(folder)
    if config["model_type"] == "llama4_text":
        return _below_language_model(folder)
    if config["model_type"] != "gpt_oss" or "quantization" in config:
        return folder
    weights: Any = mx.load(str(folder / "model.safetensors"))
    stored = {}
    for name, array in weights.items():
        experts, _, kind = name.partition("gate_up_proj")
        if kind or name.endswith("gate_up_proj"):
            for offset, half in enumerate(("gate_proj", "up_proj")):
                part = array[..., offset::2]
                stored[experts + half + (".bias" if kind else ".weight")] = part if kind else part.swapaxes(1, 2)
        elif name.endswith("experts.down_proj"):
            stored[f"{name}.weight"] = array.swapaxes(1, 2)
        else:
            stored[name.replace("down_proj_bias", "down_proj.bias")] = array
    target = folder.with_name(f"{folder.name}_mlx")
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), stored, {"format": "mlx"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def _below_language_model(folder: Path) -> Path:
    weights: Any = mx.load(str(folder / "model.safetensors"))
    target = folder.with_name(f"{folder.name}_wrapped")
    target.mkdir()
    stored = {f"language_model.{name}": array for name, array in weights.items()}
    mx.save_safetensors(str(target / "model.safetensors"), stored, {"format": "mlx"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


@cache
def experts_in_stacks(folder: Path) -> Path:
    """A copy with all of a layer's experts in two tensors, as Qwen3.5 was published; transformers saves each alone."""
    weights: Any = mx.load(str(folder / "model.safetensors"))
    layers = {name.partition("experts.")[0] for name in weights if ".experts." in name}
    stored = {name: array for name, array in weights.items() if ".experts." not in name}
    for layer in layers:
        count = len([name for name in weights if name.startswith(f"{layer}experts.") and "down_proj" in name])
        gate, up, down = (
            mx.stack([weights[f"{layer}experts.{index}.{part}_proj.weight"] for index in range(count)])
            for part in ("gate", "up", "down")
        )
        stored |= {
            f"{layer}experts.gate_up_proj": mx.concatenate([gate, up], axis=1),
            f"{layer}experts.down_proj": down,
        }
    target = folder.with_name(f"{folder.name}_stacks")
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), stored, {"format": "mlx"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target
