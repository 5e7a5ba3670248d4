"""GGUF files of tiny real models, as a converter would write them, and the same weights unpacked for transformers.

The direction is the other one than Potluck's, and so are the tables: what a converter renames, permutes and adds is
written down here on its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.gguf_blocks import Floats, dequantised, stored
from tests.gguf_files import Stored, write_gguf

WIDE: dict[str, object] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
"""Every matrix has rows of 256 values, which the nested formats need."""

Choose = Callable[[str], str]
"""The type in which a tensor of a GGUF name is stored."""


def as_q4_k_m(name: str) -> str:
    """Much as the most popular recipe: half of the values and of what leads out of an MLP get more bits."""
    if name == "output.weight" or name.startswith(("blk.0.attn_v", "blk.0.ffn_down")):
        return "Q6_K"
    return "Q4_K"


def write_model(folder: Path, path: Path, choose: Choose, extra: Mapping[str, object] | None = None) -> Path:
    """The checkpoint in `folder` as a GGUF file; beside it `unpacked/`, the same weights for transformers."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}
    tensors = _apart(tensors)
    written: dict[str, Stored] = {}
    unpacked: dict[str, Floats] = {}
    for name, sources in sources_by_name(tensors, config).items():
        values = np.stack([tensors[source] for source in sources]) if len(sources) > 1 else tensors[sources[0]]
        is_matrix = values.ndim > 1 and name.endswith(".weight") and "ffn_gate_inp" not in name
        kind = choose(name) if is_matrix else "F32"
        written[name] = stored(_as_converted(values, name, config), kind)
        # Rows are stored one by one, so their order does not change what becomes of their values.
        plain = dequantised(stored(values.astype(np.float32), kind))
        unpacked |= dict(zip(sources, plain if len(sources) > 1 else [plain], strict=True))
    written |= {name: stored(np.array(factors, np.float32), "F32") for name, factors in _rotations(config).items()}
    described = {**metadata(config), **(tokenizer_metadata(folder)), **(extra or {})}
    target = path.parent / "unpacked"
    target.mkdir(parents=True)
    save_file(_together(unpacked), target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return write_gguf(path, described, written)


def _apart(tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    """gpt-oss' stacks of experts [experts, in, out], of which even columns are gates, as one stack for each matrix."""
    found: dict[str, Floats] = {}
    for name, values in tensors.items():
        stem, _, kind = (
            name.partition("_proj_") if name.endswith("_bias") else (name.removesuffix("_proj"), "", "weight")
        )
        if not stem.endswith((".experts.gate_up", ".experts.down")):
            found[name] = values
            continue
        rows = values if kind == "bias" else values.swapaxes(1, 2)
        halves = {"gate": rows[:, 0::2], "up": rows[:, 1::2]} if stem.endswith("gate_up") else {"down": rows}
        block = stem.rpartition(".")[0]
        found |= {f"{block}.{part}_proj.{kind}": np.ascontiguousarray(half) for part, half in halves.items()}
    return found


def _together(tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    """The other way."""
    found = {name: values for name, values in tensors.items() if ".experts.gate_proj." not in name}
    for name, gates in tensors.items():
        if ".experts.gate_proj." in name:
            ups, downs = (found.pop(name.replace("gate_proj", part)) for part in ("up_proj", "down_proj"))
            both = np.stack([gates, ups], axis=2).reshape(gates.shape[0], -1, *gates.shape[2:])
            block, kind = name.removesuffix(f"gate_proj.{name.rpartition('.')[2]}"), name.rpartition(".")[2]
            ending = "" if kind == "weight" else "_bias"
            for part, values in (("gate_up_proj", both), ("down_proj", downs)):
                ordered = values.swapaxes(1, 2) if kind == "weight" else values
                found[f"{block}{part}{ending}"] = np.ascontiguousarray(ordered)
    return found


def tokenizer_metadata(folder: Path) -> dict[str, object]:
    """The byte-level tokenizer of the tests' checkpoints, and its chat template."""
    backend = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary: dict[str, int] = backend["model"]["vocab"]
    special = {token["content"]: token["id"] for token in backend["added_tokens"]}
    tokens = [token for token, _ in sorted((vocabulary | special).items(), key=lambda item: item[1])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": special[settings["bos_token"]],
        "tokenizer.ggml.eos_token_id": special[settings["eos_token"]],
        "tokenizer.ggml.padding_token_id": special[settings["pad_token"]],
        "tokenizer.chat_template": settings["chat_template"],
    }


def sources_by_name(tensors: Iterable[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The GGUF tensors, and which of the checkpoint's each is made of (several: a stack of experts)."""
    sources: dict[str, list[str]] = {}
    for name in tensors:
        sources.setdefault(_gguf_name(name, config), []).append(name)
    for stack in sources.values():
        stack.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    return sources


_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_GPT_OSS = {
    "post_attention_layernorm": "post_attention_norm",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _gguf_name(name: str, config: Mapping[str, Any]) -> str:
    stem, _, kind = name.rpartition(".")
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if stem in ends:
        return f"{ends[stem]}.{kind}"
    if name.endswith(".self_attn.sinks"):
        return f"blk.{name.split('.')[2]}.attn_sinks.weight"
    _, _, layer, *inner = stem.split(".")
    if inner[:2] == ["mlp", "experts"] and inner[2].isdigit():
        return f"blk.{layer}.ffn_{inner[3].removesuffix('_proj')}_exps.{kind}"
    names = _INNER | {"gemma": _GEMMA, "gpt_o": _GPT_OSS}.get(config["model_type"][:5], {})
    return f"blk.{layer}.{names['.'.join(inner)]}.{kind}"


def _as_converted(values: Floats, name: str, config: Mapping[str, Any]) -> Floats:
    values = values.astype(np.float32)
    if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    inner = name.split(".")[-2]
    if config["model_type"] in ("llama", "mistral") and inner in heads:
        # Row i of a head's first half and row i of its second become neighbours.
        split = values.reshape(heads[inner], 2, -1, *values.shape[1:])
        return np.ascontiguousarray(np.moveaxis(split, 1, 2)).reshape(values.shape)
    return values


def _rotations(config: Mapping[str, Any]) -> dict[str, list[float]]:
    rope = config.get("rope_parameters") or {}
    match rope.get("rope_type"):
        case "llama3":
            return {"rope_freqs.weight": _llama3_factors(rope, config["head_dim"])}
        case "longrope":
            names = {"rope_factors_short.weight": "short_factor", "rope_factors_long.weight": "long_factor"}
            return {name: rope[factors] for name, factors in names.items()}
    return {}


def _llama3_factors(rope: Mapping[str, Any], dims: int) -> list[float]:
    """As transformers slows frequencies, told by wavelengths."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original, factors = rope["original_max_position_embeddings"], []
    for pair in range(dims // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / dims)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors


_NAMES = {"mistral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "gpt_oss": "gpt-oss"}


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """A file's metadata about its model, as converters write it."""
    arch = _NAMES.get(config["model_type"], config["model_type"])
    rope = config["rope_parameters"]
    everywhere = rope.get("full_attention", rope)
    found: dict[str, object] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": "Tiny",
        "general.license": "apache-2.0",
        "general.file_type": 15,
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{arch}.attention.key_length": config["head_dim"],
        f"{arch}.attention.value_length": config["head_dim"],
        f"{arch}.rope.freq_base": float(everywhere["rope_theta"]),
        f"{arch}.vocab_size": config["vocab_size"],
    }
    if arch == "qwen3moe":
        found[f"{arch}.expert_count"] = config.get("num_experts") or config["num_local_experts"]
        found[f"{arch}.expert_used_count"] = config["num_experts_per_tok"]
        found[f"{arch}.expert_feed_forward_length"] = config["moe_intermediate_size"]
    if arch == "gpt-oss":
        found[f"{arch}.expert_count"] = config["num_local_experts"]
        found[f"{arch}.expert_used_count"] = config["num_experts_per_tok"]
        found[f"{arch}.expert_feed_forward_length"] = config["intermediate_size"]
    if config.get("sliding_window"):
        found[f"{arch}.attention.sliding_window"] = config["sliding_window"]
    if arch == "gemma2":
        found["gemma2.attn_logit_softcapping"] = config["attn_logit_softcapping"]
        found["gemma2.final_logit_softcapping"] = config["final_logit_softcapping"]
    if arch == "gemma3":
        found["gemma3.rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        found["gemma3.attention.sliding_window_pattern"] = config["layer_types"].index("full_attention") + 1
    if arch == "phi3":
        found["phi3.rope.dimension_count"] = int(config["head_dim"] * rope.get("partial_rotary_factor", 1))
    match everywhere.get("rope_type"):
        case "longrope":
            found[f"{arch}.rope.scaling.original_context_length"] = config["original_max_position_embeddings"]
        case "linear" | "yarn" as kind:
            found[f"{arch}.rope.scaling.type"] = kind
            found[f"{arch}.rope.scaling.factor"] = float(everywhere["factor"])
            if kind == "yarn":
                original = everywhere["original_max_position_embeddings"]
                found[f"{arch}.rope.scaling.original_context_length"] = original
    return found
