"""What the tiny checkpoints of each family set in their configuration, besides what all of them do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _qwen3_moe(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    return {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def _gemma3(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    """Both kinds of layer, and a window that short prompts already exceed. The pattern is written as a number and as
    a list, because published checkpoints have either."""
    pattern = int(str(overrides.pop("sliding_window_pattern", 3)))
    return {
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": _every(pattern, layers),
        "sliding_window_pattern": pattern,
        "rope_parameters": _two_rotations(),
    }


def _mistral(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    """As published since version 0.2: without a window."""
    return {"sliding_window": None}


def _ministral3(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    """Queries grow at every 16th position, much more than those of published ones."""
    stretch = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.5}
    length = {"mscale": 1.0, "mscale_all_dim": 1.0}
    return {
        "rope_parameters": stretch | length | {"rope_theta": 50_000.0, "original_max_position_embeddings": 16},
        "max_position_embeddings": 512,
    }


def _glm4(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0, "partial_rotary_factor": 0.5}}


def _olmo3(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    stretch = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    rotations = _two_rotations()
    rotations["full_attention"] = rotations["sliding_attention"] | stretch  # as published: one base, one stretched
    return {"sliding_window": 16, "layer_types": _every(3, layers), "rope_parameters": rotations}


def _gemma2(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    """Soft-caps that bend ordinary scores and logits, so that losing one shows."""
    return {
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": _every(2, layers),
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 20.0,
    }


def _gpt_oss(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    stretch = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return {
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": _every(2, layers),
        "rope_parameters": stretch | {"rope_theta": 50_000.0, "original_max_position_embeddings": 1024},
    }


def _deepseek_v3(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    """Two dense layers first; groups of experts; latents of another width than anything else."""
    stretch = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {
        "num_key_value_heads": 4,
        "head_dim": 8,  # as the library derives it: the rotated part
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 2,
        "routed_scaling_factor": 1.5,
        "rope_parameters": stretch | {"rope_theta": 50_000.0, "original_max_position_embeddings": 1024},
    }


def _delta_rule(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    """Layers 0, 1, 3 and 4 of six keep a state; more heads for values than for keys; half of a head is rotated."""
    rope = {"rope_type": "default", "rope_theta": 50_000.0, "partial_rotary_factor": 0.5}
    return {
        "layer_types": ["full_attention" if (i + 1) % 3 == 0 else "linear_attention" for i in range(layers)],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 12,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": rope,
    }


def _qwen3_next(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    return _delta_rule(layers, overrides) | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    }


def _qwen3_5(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    fields = _delta_rule(layers, overrides)
    rope: Any = fields["rope_parameters"]
    return fields | {"rope_parameters": rope | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}}


def _qwen3_5_moe(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    return _qwen3_5(layers, overrides) | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    }


def _lfm2(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    kinds = ["full_attention" if (i + 1) % 3 == 0 else "conv" for i in range(layers)]
    return {"layer_types": kinds, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True}


def _gemma4(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    """As the larger ones: heads of two sizes, values that are unrotated keys, experts beside a dense MLP."""
    rotations = _two_rotations()
    rotations["full_attention"] |= {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    return {
        "tie_word_embeddings": True,
        "sliding_window": 16,
        "layer_types": _every(3, layers),
        "rope_parameters": rotations,
        "final_logit_softcapping": 20.0,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    }


def _gemma4_small(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    """Layers have inputs of their own. Two layers more than asked for attend to the keys of the two before them, one of
    each kind, in wider MLPs."""
    kinds = [*_every(3, layers - 2), "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    return _gemma4(layers, overrides) | {
        "num_hidden_layers": layers + 2,
        "layer_types": kinds,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 24,
        "vocab_size_per_layer_input": 384,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "enable_moe_block": False,
    }


def _llama4(layers: int, overrides: dict[str, object]) -> dict[str, object]:
    """Chunks that short prompts exceed; layer 3 sees everything and its queries soon grow; every second layer has
    experts."""
    return {
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
        "floor_scale": 4,
        "attn_scale": 0.7,
    }


FIELDS: dict[str, Callable[[int, dict[str, object]], dict[str, object]]] = {
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "lfm2": _lfm2,
    "gemma4": _gemma4,
    "llama4": _llama4,
    "gemma4_small": _gemma4_small,
    "qwen3_moe": _qwen3_moe,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "glm4": _glm4,
    "ministral3": _ministral3,
    "olmo3": _olmo3,
    "gemma2": _gemma2,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
}


def _every(period: int, layers: int) -> list[str]:
    """Layers with a window, except each `period`-th, which sees everything."""
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


def _two_rotations() -> dict[str, dict[str, object]]:
    thetas = {"full_attention": 200_000.0, "sliding_attention": 5_000.0}
    return {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}
