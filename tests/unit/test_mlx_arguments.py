"""A configuration means the same to mlx-lm as to whoever wrote it, or it is refused. Needs no MLX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from node.engines.mlx.arguments import read_arguments

SIZES = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 384,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def fields(model_type: str, **config: Any) -> dict[str, Any]:
    checkpoint = Checkpoint(Path("model"), {"model_type": model_type, **SIZES, **config}, {})
    return dict(read_arguments(checkpoint).fields)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_rotation_is_read_as_either_version_of_transformers_wrote_it(model_type: str) -> None:
    new = fields(model_type, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    old = fields(model_type, rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    assert new == old
    assert (new["rope_theta"], new["rope_scaling"]) == (5e5, {"rope_type": "llama3", **LLAMA3})


def test_a_default_rotation_has_a_base_and_no_scaling() -> None:
    stated = fields("qwen3", rope_parameters={"rope_type": "default", "rope_theta": 12_345})
    assert (stated["rope_theta"], stated["rope_scaling"]) == (12_345.0, None)
    silent = fields("llama")
    assert (silent["rope_theta"], silent["rope_scaling"]) == (10_000.0, None)


def test_gemma_has_one_rotation_for_each_kind_of_layer() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    new = fields(
        "gemma3_text",
        sliding_window=16,
        rope_parameters={
            "full_attention": {**linear, "rope_theta": 2e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    )
    old = fields("gemma3_text", sliding_window=16, rope_theta=2e5, rope_local_base_freq=5e3, rope_scaling=linear)
    assert new == old
    assert (new["rope_theta"], new["rope_local_base_freq"], new["rope_scaling"]) == (2e5, 5e3, linear)


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({}, 6),
        ({"sliding_window_pattern": 2}, 2),
        ({"sliding_window_pattern": 99}, 7),
        ({"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}, 3),
        ({"layer_types": ["full_attention"] * 6}, 1),
        ({"layer_types": ["sliding_attention"] * 6}, 7),
    ],
)
def test_gemmas_layers_without_a_window_are_found(config: dict[str, Any], pattern: int) -> None:
    assert fields("gemma3_text", **config)["sliding_window_pattern"] == pattern


def test_what_a_gemma_configuration_leaves_out_means_what_transformers_means() -> None:
    """mlx-lm's own defaults are those of another size."""
    config = {"model_type": "gemma3", "text_config": {k: v for k, v in SIZES.items() if k not in ("vocab_size",)}}
    silent = dict(read_arguments(Checkpoint(Path("model"), config, {})).fields)
    assert (silent["vocab_size"], silent["sliding_window"], silent["query_pre_attn_scalar"]) == (262_208, 4096, 256)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_experts_are_counted_under_either_name(name: str) -> None:
    experts = {**EXPERTS, name: EXPERTS["num_experts"]}
    if name != "num_experts":
        del experts["num_experts"]
    found = fields("qwen3_moe", **experts)
    assert found["num_experts"] == 8
    assert (found["norm_topk_prob"], found["decoder_sparse_step"], found["mlp_only_layers"]) == (False, 1, [])


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("mamba2", {}, "mamba2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"model_file": "modeling.py"}, "model_file"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"] * 3}, "regularly"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "6 layer_types"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "numbers"),
        ("llama", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 2.0}},
            "attention_factor",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_type": "yarn"}}, "contradict"),
        ("qwen3", {"rope_theta": -1}, "rope_theta"),
        ("qwen3", {"rope_theta": "10000"}, "rope_theta"),
        ("qwen3", {"rope_parameters": [1]}, "rope"),
        ("qwen3_moe", {**EXPERTS, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
    ],
)
def test_what_mlx_lm_would_ignore_is_refused_by_name(model_type: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fields(model_type, **config)
