"""Checkpoints as `mlx_lm.convert` writes them, and the way back: the same numbers, unpacked, as transformers stores
them. Written for tests alone and apart from the engines' own translation, so that the two can disagree."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from tests.oracle.mlx_reference import as_mlx_lm_stores_it, whole_mlx_model

Predicate = Callable[[str, Any], Any]

_RAISED = re.compile(r"(.+\.)?(input_layernorm|post_attention_layernorm|q_norm|k_norm|model\.norm)\.weight")


def convert(
    folder: Path,
    target: Path,
    *,
    bits: int | None = None,
    group: int = 32,
    mode: str = "affine",
    packs: Predicate | None = None,
) -> Path:
    """What mlx_lm.convert makes of a checkpoint; in full precision without `bits`."""
    stated = dict(whole_mlx_model(folder).stated)
    model, _ = load_model(as_mlx_lm_stores_it(folder), model_config=stated)
    config = json.loads((folder / "config.json").read_text())
    if bits is not None:
        model, config = quantize_model(
            model, config, group_size=group, bits=bits, mode=mode, quant_predicate=packs or _whole_groups(group)
        )
    target.mkdir(parents=True)
    save_model(target, model)
    save_config(config, target / "config.json")
    return target


def _whole_groups(group: int) -> Predicate:
    return lambda path, module: module.weight.shape[-1] % group == 0


def unconverted(folder: Path, target: Path) -> Path:
    """The converted checkpoint in full precision and in transformers' words."""
    config = json.loads((folder / "config.json").read_text())
    stated: Any = config.pop("quantization", None)
    config.pop("quantization_config", None)
    tensors = _unpacked(dict(mx.load(str(folder / "model.safetensors"))), stated)  # type: ignore[arg-type]
    target.mkdir(parents=True)
    mx.save_safetensors(str(target / "model.safetensors"), _in_words_of_transformers(tensors, config), {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def _unpacked(tensors: dict[str, mx.array], stated: Any) -> dict[str, mx.array]:
    whole = {}
    for name, array in tensors.items():
        path = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if f"{path}.scales" not in tensors or name == path:
            whole[name] = array
            continue
        own = stated.get(path)
        how = own if isinstance(own, dict) else stated
        scales, biases = tensors[f"{path}.scales"], tensors.get(f"{path}.biases")
        settings = {"group_size": how["group_size"], "bits": how["bits"], "mode": how.get("mode", "affine")}
        if biases is None:
            whole[name] = mx.dequantize(array, scales, **settings, dtype=mx.float32)
        else:
            exact = [part.astype(mx.float32) for part in (scales, biases)]
            whole[name] = mx.dequantize(array, *exact, **settings)
    return whole


def _in_words_of_transformers(tensors: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    model_type = config["model_type"]
    words: dict[str, mx.array] = {}
    tensors = {name.removeprefix("language_model."): array for name, array in tensors.items()}
    for name, array in tensors.items():
        head, _, part = name.partition(".switch_mlp.")
        if part:
            words |= {f"{head}.experts.{index}.{part}": array[index] for index in range(array.shape[0])}
        elif ".experts.switch_glu." in name or ".feed_forward.experts." in name:
            words |= _in_stacks(name, tensors, inputs_first=model_type == "llama4_text")
        elif model_type == "gpt_oss" and ".experts." in name:
            words |= _of_gpt_oss(name, tensors)
        elif name.endswith((".embed_q.weight", ".unembed_out.weight")):
            attention = name.rpartition(".self_attn.")[0] + ".self_attn."
            keys = tensors[f"{attention}embed_q.weight"].swapaxes(1, 2)
            both = mx.concatenate((keys, tensors[f"{attention}unembed_out.weight"]), axis=1)
            words[f"{attention}kv_b_proj.weight"] = both.flatten(0, 1)
        elif name.endswith(("conv1d.weight", "conv.conv.weight")):
            words[name] = array.swapaxes(1, 2)
        elif model_type.startswith("qwen3_") and model_type != "qwen3_moe" and _RAISED.fullmatch(name):
            words[name] = array - 1
        else:
            words[name] = array
    return {name: mx.contiguous(array) for name, array in words.items()}


def _in_stacks(name: str, tensors: dict[str, mx.array], *, inputs_first: bool) -> dict[str, mx.array]:
    """Gates above ups in one stack of all experts."""
    head, _, part = name.rpartition(".experts.")
    prefix, _, rest = part.rpartition("gate_proj") if "gate_proj" in part else part.rpartition("up_proj")
    if "down_proj" in part:
        stack, array = "down_proj", tensors[name]
    else:
        stack = "gate_up_proj"
        array = mx.concatenate(
            [tensors[f"{head}.experts.{prefix}{half}_proj{rest}"] for half in ("gate", "up")], axis=1
        )
    return {f"{head}.experts.{stack}": array.swapaxes(1, 2) if inputs_first else array}


def _of_gpt_oss(name: str, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Gates and ups in turns, inputs before outputs."""
    head, _, rest = name.partition(".experts.")
    part, _, kind = rest.partition(".")
    ending = "" if kind == "weight" else "_bias"
    if part == "down_proj":
        array = tensors[name]
        return {f"{head}.experts.down_proj{ending}": array if ending else array.swapaxes(1, 2)}
    gate, up = (tensors[f"{head}.experts.{half}_proj.{kind}"] for half in ("gate", "up"))
    both = mx.stack((gate, up), axis=2).flatten(1, 2)
    return {f"{head}.experts.gate_up_proj{ending}": both if ending else both.swapaxes(1, 2)}
