"""A model's costs follow from its headers, and files that contradict its configuration are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import ModelFacts, read_facts
from cluster.models.formats import Packing, Quantization
from cluster.rewinding import REWIND_TOKENS
from cluster.types import Backend, DType, TensorSpec
from tests.paper_models import (
    EXPERT_INNER,
    EXPERTS,
    EXPERTS_USED,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    VOCABULARY,
    Tensors,
    paper_config,
    paper_tensors,
    write_model,
    write_paper_model,
)


def facts_of(folder: Path, config: dict[str, Any], tensors: Tensors) -> ModelFacts:
    return read_facts(open_checkpoint(write_model(folder, config, tensors)))


def refusal(folder: Path, config: dict[str, Any], tensors: Tensors) -> str:
    with pytest.raises(ModelError) as caught:
        facts_of(folder, config, tensors)
    return str(caught.value)


ATTENTION = 2 * HEADS * HEAD_DIM * HIDDEN + 2 * KV_HEADS * HEAD_DIM * HIDDEN
LLAMA_LAYER = ATTENTION + 3 * HIDDEN * INNER + 2 * HIDDEN


def test_dense_layers_cost_what_is_stored(tmp_path: Path) -> None:
    facts = read_facts(open_checkpoint(write_paper_model(tmp_path, "llama", dtype=DType.BF16)))
    assert [layer.streamed_bytes for layer in facts.layers] == [2 * LLAMA_LAYER] * 3
    assert facts.layers[1].resident_bytes == {Backend.TORCH: 2 * LLAMA_LAYER, Backend.MLX: 2 * LLAMA_LAYER}
    assert facts.layers[1].kv_bytes_per_token == 2 * KV_HEADS * HEAD_DIM * 2
    assert facts.embedding_bytes == facts.head_bytes == 2 * VOCABULARY * HIDDEN
    assert (facts.norm_bytes, facts.dtype, facts.tied) == (2 * HIDDEN, DType.BF16, False)
    assert facts.stored_bytes == 6 * LLAMA_LAYER + 2 * facts.embedding_bytes + facts.norm_bytes


def test_names_and_boundary(tmp_path: Path) -> None:
    facts = read_facts(open_checkpoint(write_paper_model(tmp_path, "qwen3")))
    assert (facts.architecture, facts.model_type) == ("Qwen3ForCausalLM", "qwen3")
    assert facts.boundary == (TensorSpec("hidden", (HIDDEN,), DType.F32),)
    assert (facts.legal_cuts, facts.context_tokens) == ({0, 1, 2}, 4096)


def test_of_the_experts_only_the_used_ones_are_streamed(tmp_path: Path) -> None:
    layer = read_facts(open_checkpoint(write_paper_model(tmp_path, "qwen3_moe"))).layers[0]
    experts = 4 * EXPERTS * 3 * HIDDEN * EXPERT_INNER
    others = 4 * (ATTENTION + 2 * HIDDEN + 2 * HEAD_DIM + EXPERTS * HIDDEN)
    assert layer.resident_bytes[Backend.TORCH] == others + experts
    assert layer.streamed_bytes == others + experts * EXPERTS_USED // EXPERTS


def test_a_tied_head_weighs_what_the_embedding_weighs(tmp_path: Path) -> None:
    facts = read_facts(open_checkpoint(write_paper_model(tmp_path, "gemma3")))
    assert facts.tied
    assert facts.head_bytes == facts.embedding_bytes == 4 * VOCABULARY * HIDDEN
    assert facts.stored_bytes == 3 * facts.layers[0].streamed_bytes + facts.embedding_bytes + facts.norm_bytes


def test_layers_with_a_window_keep_little_more_than_that(tmp_path: Path) -> None:
    config = paper_config("gemma3") | {"sliding_window": 32, "layer_types": None, "sliding_window_pattern": 2}
    facts = facts_of(tmp_path, config, paper_tensors("gemma3"))
    kept = (32 + REWIND_TOKENS) * 9 // 8
    assert [layer.kv_tokens_max for layer in facts.layers] == [kept, None, kept]
    assert len({layer.kv_bytes_per_token for layer in facts.layers}) == 1


def test_a_vision_language_checkpoint_counts_its_text_model_alone(tmp_path: Path) -> None:
    text = {key: value for key, value in paper_config("gemma3").items() if key != "architectures"}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    tensors = {f"language_model.{name}": value for name, value in paper_tensors("gemma3").items()}
    tensors["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = (DType.F32, (50, 50))
    inner = read_facts(open_checkpoint(write_paper_model(tmp_path / "text", "gemma3")))
    outer = facts_of(tmp_path / "both", config, tensors)
    assert (outer.layers, outer.stored_bytes, outer.model_type) == (inner.layers, inner.stored_bytes, "gemma3_text")
    assert outer.architecture == "Gemma3ForConditionalGeneration"


def test_gemma3_may_leave_out_what_its_family_defaults(tmp_path: Path) -> None:
    tensors = paper_tensors("gemma3")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.k_proj.weight"] = (DType.F32, (4 * 256, HIDDEN))
    tensors["model.embed_tokens.weight"] = (DType.BF16, (262_208, HIDDEN))
    left_out = {"num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"}
    config = {key: value for key, value in paper_config("gemma3").items() if key not in left_out}
    facts = facts_of(tmp_path, config, tensors)
    assert (facts.vocab_size, facts.context_tokens, facts.attention_width) == (262_208, 131_072, (8 + 2 * 4) * 256)


def test_head_size_follows_from_the_heads_when_llama_is_silent(tmp_path: Path) -> None:
    config = paper_config("llama") | {"head_dim": None, "num_attention_heads": 2, "num_key_value_heads": None}
    assert facts_of(tmp_path, config, paper_tensors("llama")).layers[0].kv_bytes_per_token == 2 * 2 * 8 * 4


def test_the_number_of_experts_has_two_spellings(tmp_path: Path) -> None:
    config = paper_config("qwen3_moe")
    config["num_local_experts"] = config.pop("num_experts")
    assert facts_of(tmp_path, config, paper_tensors("qwen3_moe")).layers


def test_a_dense_mlp_that_no_layer_has_takes_no_memory(tmp_path: Path) -> None:
    """Its width is stated all the same."""
    config = paper_config("qwen3_moe") | {"intermediate_size": 100_000}
    facts = facts_of(tmp_path, config, paper_tensors("qwen3_moe"))
    assert facts.mlp_width == config["num_experts_per_tok"] * config["moe_intermediate_size"]


def packed_tensors() -> Tensors:
    """Llama as MLX packs it in 4 bits, in groups of 8."""
    tensors: Tensors = {}
    for name, (_, shape) in paper_tensors("llama").items():
        if len(shape) == 1:
            tensors[name] = (DType.F16, shape)
            continue
        tensors[name] = (DType.U32, (shape[0], shape[1] // 8))
        for extra in ("scales", "biases"):
            tensors[f"{name.removesuffix('weight')}{extra}"] = (DType.F16, (shape[0], shape[1] // 8))
    return tensors


def test_packed_by_mlx_runs_on_both_engines_and_stays_packed(tmp_path: Path) -> None:
    config = paper_config("llama") | {"quantization": {"bits": 4, "group_size": 8}}
    facts = facts_of(tmp_path, config, packed_tensors())
    assert facts.backends == set(Backend)
    assert facts.quantization == Quantization(Packing.AFFINE, 4, 8)
    assert facts.layers[0].resident_bytes == dict.fromkeys(Backend, (LLAMA_LAYER - 2 * HIDDEN) + 2 * 2 * HIDDEN)
    assert facts.dtype == DType.F16
    assert facts.embedding_bytes == VOCABULARY * HIDDEN


@pytest.mark.parametrize("packed", [{"quant_method": "bitsandbytes", "bits": 4}, {"quant_method": ["fp8"]}])
def test_refuses_other_quantisations_by_name(tmp_path: Path, packed: object) -> None:
    message = refusal(tmp_path, paper_config("llama") | {"quantization_config": packed}, paper_tensors("llama"))
    assert "which Potluck does not read; use the unquantised model" in message


@pytest.mark.parametrize("packed", [{"bits": 4}, {"bits": True, "group_size": 64}, {"bits": 99, "group_size": 64}])
def test_refuses_a_damaged_quantisation(tmp_path: Path, packed: object) -> None:
    message = refusal(tmp_path, paper_config("llama") | {"quantization": packed}, paper_tensors("llama"))
    assert "expected quantization with bits" in message


def test_an_unknown_architecture_is_named_beside_the_supported_ones(tmp_path: Path) -> None:
    config = {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    message = refusal(tmp_path, config, paper_tensors("llama"))
    assert "'MambaForCausalLM' (model_type 'mamba') is not supported" in message
    assert "Llama (llama), Qwen3 (qwen3), Qwen3 MoE (qwen3_moe), Gemma 3 (text) (gemma3_text)" in message


@pytest.mark.parametrize("config", [{}, {"model_type": ["llama"]}, {"architectures": 3}, {"architectures": []}])
def test_refuses_a_configuration_without_a_family(tmp_path: Path, config: dict[str, object]) -> None:
    assert "is not supported" in refusal(tmp_path, config, paper_tensors("llama"))


def test_refuses_a_vision_language_model_without_its_text_model(tmp_path: Path) -> None:
    assert "expected text_config" in refusal(tmp_path, {"model_type": "gemma3"}, paper_tensors("gemma3"))


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "only without it"),
        ("gemma3", {"layer_types": ["chunked_attention"]}, "found chunked_attention"),
        ("llama", {"layer_types": ["sliding_attention"]}, "found sliding_attention"),
        ("qwen3", {"use_sliding_window": True}, "found sliding_attention"),
    ],
)
def test_refuses_settings_that_not_every_engine_honours(
    tmp_path: Path, family: str, setting: dict[str, object], message: str
) -> None:
    assert message in refusal(tmp_path, paper_config(family) | setting, paper_tensors(family))


@pytest.mark.parametrize("value", [0, -1, True, "3", 3.0, 1 << 40, [], None])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_refuses_numbers_that_are_none(tmp_path: Path, name: str, value: object) -> None:
    message = refusal(tmp_path, paper_config("llama") | {name: value}, paper_tensors("llama"))
    assert f"expected {name} to be a whole number" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 5}, "gives 5 layers, but the files hold 3: layer 3 is missing"),
        ({"num_hidden_layers": 2}, "gives 2 layers, but the files hold 3: they go up to layer 2"),
        ({"vocab_size": 41}, "gives vocab_size 41, but the embedding has shape [40, 16]"),
        ({"hidden_size": 32}, "gives hidden_size 32, but the final norm has shape [16]"),
        ({"num_key_value_heads": 4}, "gives 4 key heads of 8, but layer 0 has keys of shape [16, 16]"),
    ],
)
def test_refuses_a_configuration_that_the_files_contradict(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    assert message in refusal(tmp_path, paper_config("llama") | change, paper_tensors("llama"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.embed_tokens.weight", "expected the weights of the embedding, found none"),
        ("model.norm.weight", "expected the weights of the final norm, found none"),
        ("lm_head.weight", "expected the weights of the head, found none"),
        ("model.layers.1.self_attn.v_proj.weight", "layer 1 lacks self_attn.v_proj.weight"),
        ("model.layers.2.mlp.down_proj.weight", "layer 2 lacks mlp.down_proj.weight"),
        ("model.layers.1.", "layer 1 is missing"),
    ],
)
def test_names_what_is_missing(tmp_path: Path, missing: str, message: str) -> None:
    tensors = {name: value for name, value in paper_tensors("llama").items() if not name.startswith(missing)}
    assert message in refusal(tmp_path, paper_config("llama"), tensors)


def test_refuses_weights_that_no_engine_computes_in(tmp_path: Path) -> None:
    message = refusal(tmp_path, paper_config("llama"), paper_tensors("llama", dtype=DType.F64))
    assert "the embedding is stored as F64; expected BF16, F16, F32" in message
