"""Settings that mlx-lm would ignore, or compute otherwise than transformers, are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from node.engines.mlx.arguments import read_arguments
from tests.oracle.test_mlx_families import LONG_ROPE, YARN

SIZES = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
WIDE = {"head_dim": 32, "num_key_value_heads": 1}
VARIED = {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2, "hidden_size_per_layer_input": 0}


def turned(full: dict[str, object]) -> dict[str, object]:
    """Rotations as Gemma 4 states them, with these settings for layers that see everything."""
    everywhere = {"rope_type": "proportional", "rope_theta": 1e6, **full}
    return {"full_attention": everywhere, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
DEEPSEEK = {**LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("qwen2", {"head_dim": 32}, "head_dim is 32"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window from 1"),
        ("olmo3", {"layer_types": ["sliding_attention"] * 6}, "needs both kinds"),
        ("olmo3", {"rope_theta": 20_000.0}, "only one base"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 6}, "chunked_attention"),
        ("phi3", {**LONG_ROPE, "original_max_position_embeddings": "128"}, "original_max_position_embeddings"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "8 numbers"),
        ("phi3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("phi3", {"partial_rotary_factor": 2}, "partial_rotary_factor"),
        ("gemma2", {}, "only a head tied"),
        ("gemma2", {"tie_word_embeddings": True, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ("gpt_oss", {**EXPERTS, "swiglu_limit": 5.0}, "swiglu_limit"),
        ("gpt_oss", {**EXPERTS, "tie_word_embeddings": True}, "only a head of its own"),
        ("deepseek_v3", {**DEEPSEEK, "rope_interleave": False}, "rope_interleave"),
        ("deepseek_v3", {**DEEPSEEK, "rope_scaling": YARN | {"mscale": 1.0}}, "mscale_all_dim"),
        ("deepseek_v3", {**DEEPSEEK, "scoring_func": "softmax"}, "scoring_func"),
        ("glm4", {"rope_scaling": YARN}, "yarn"),
        ("glm4", {"tie_word_embeddings": True}, "only a head of its own"),
        ("ministral3", {"sliding_window": 8}, "sliding_window is 8"),
        ("ministral3", {"rope_parameters": YARN}, "llama_4_scaling_beta"),
        ("ministral3", {"rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}}, "rope_type"),
        ("gemma4_text", {**VARIED, "use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ("gemma4_text", {**VARIED, "layer_types": ["full_attention"] * 6}, "needs both kinds"),
        ("gemma4_text", {**VARIED, "per_layer_config": {"5": {"head_dim": 32}}}, "for each of the layers 2, 5"),
        ("gemma4_text", {**VARIED, "per_layer_config": {"2": WIDE, "5": {"head_dim": 64}}}, "per_layer_config"),
        ("gemma4_text", {**VARIED, "per_layer_config": {"2": WIDE, "5": WIDE}}, "these are the values too"),
        ("gemma4_text", {**VARIED, "global_head_dim": 0}, "sizes and numbers of heads"),
        ("gemma4_text", {**VARIED, "rope_parameters": turned({"partial_rotary_factor": 0.3})}, "in eighths"),
        ("gemma4_text", {**VARIED, "rope_parameters": turned({"factor": "2"})}, "expected numbers"),
        ("gemma4_text", {**VARIED, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
    ],
)
def test_what_mlx_lm_would_compute_otherwise_is_refused(family: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_arguments(Checkpoint(Path("model"), {"model_type": family, **SIZES, **config}, {}))
