"""Models on paper: configuration and headers of the supported families, every weight zero. No tensor library needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.types import DType
from tests.safetensors_files import write_safetensors

Tensors = dict[str, tuple[DType, tuple[int, ...]]]

HIDDEN, INNER, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, EXPERTS_USED, EXPERT_INNER = 16, 24, 40, 4, 2, 8, 4, 2, 8

_TYPES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}


def paper_config(family: str, layers: int = 3) -> dict[str, Any]:
    """config.json as transformers 5 writes it."""
    model_type, architecture = _TYPES[family]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": family == "gemma3",
    }
    if family == "qwen3_moe":
        config |= {"num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_USED, "moe_intermediate_size": EXPERT_INNER}
    if family == "gemma3":
        config |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
    return config


def paper_tensors(family: str, layers: int = 3, dtype: DType = DType.F32) -> Tensors:
    """The tensors of `paper_config`."""
    tensors: Tensors = {
        "model.embed_tokens.weight": (dtype, (VOCABULARY, HIDDEN)),
        "model.norm.weight": (dtype, (HIDDEN,)),
    }
    if family != "gemma3":
        tensors["lm_head.weight"] = (dtype, (VOCABULARY, HIDDEN))
    for layer in range(layers):
        for name, shape in _layer(family).items():
            tensors[f"model.layers.{layer}.{name}.weight"] = (dtype, shape)
    return tensors


def write_paper_model(folder: Path, family: str = "llama", layers: int = 3, dtype: DType = DType.F32) -> Path:
    """Write both into `folder`."""
    return write_model(folder, paper_config(family, layers), paper_tensors(family, layers, dtype))


def write_model(folder: Path, config: object, tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def _layer(family: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    }
    if family != "llama":
        shapes |= {"self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,)}
    if family == "gemma3":
        shapes |= {"pre_feedforward_layernorm": (HIDDEN,), "post_feedforward_layernorm": (HIDDEN,)}
    if family == "qwen3_moe":
        shapes |= {"mlp.gate": (EXPERTS, HIDDEN)}
        for expert in range(EXPERTS):
            shapes |= _mlp(f"mlp.experts.{expert}", EXPERT_INNER)
    else:
        shapes |= _mlp("mlp", INNER)
    return shapes


def _mlp(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj": (inner, HIDDEN),
        f"{prefix}.up_proj": (inner, HIDDEN),
        f"{prefix}.down_proj": (HIDDEN, inner),
    }
