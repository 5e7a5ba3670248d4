"""What is different about families beyond plain attention: what they cache, store and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelError
from cluster.limits import SEQUENCES_MAX, SEQUENCES_PER_USER
from cluster.models import families
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import ModelFacts, read_facts
from cluster.models.family import Family
from cluster.placement import sequences_max, stage_cost
from cluster.rewinding import REWIND_TOKENS, SNAPSHOT_TOKENS, SNAPSHOTS_MAX
from cluster.types import Backend, DType, LayerRange
from tests.paper_models import (
    EXPERT_INNER,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    Tensors,
    paper_config,
    paper_tensors,
    write_model,
)

RANK, ROTATED, PLAIN, VALUE = 6, 4, 8, 5
KEY_HEADS, VALUE_HEADS, KEY_SIZE, VALUE_SIZE, KERNEL = 2, 4, 3, 5, 4
CHANNELS = 2 * KEY_HEADS * KEY_SIZE + VALUE_HEADS * VALUE_SIZE
EXPERT_NUMBERS = {"num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_INNER}


def facts_of(folder: Path, config: dict[str, Any], tensors: Tensors) -> ModelFacts:
    return read_facts(open_checkpoint(write_model(folder, config, tensors)))


def refusal(folder: Path, config: dict[str, Any], tensors: Tensors) -> str:
    with pytest.raises(ModelError) as caught:
        facts_of(folder, config, tensors)
    return str(caught.value)


def with_layers(tensors: Tensors, layers: dict[int, dict[str, tuple[int, ...]]]) -> Tensors:
    """The ends of `tensors` with these layers."""
    ends = {name: value for name, value in tensors.items() if ".layers." not in name}
    named = {
        f"model.layers.{index}.{name}.weight": shape for index, layer in layers.items() for name, shape in layer.items()
    }
    return ends | {name: (DType.F32, shape) for name, shape in named.items()}


NORMS: dict[str, tuple[int, ...]] = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
DENSE: dict[str, tuple[int, ...]] = {
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
LATENT_LAYER = {
    **NORMS,
    "self_attn.q_proj": (HEADS * (PLAIN + ROTATED), HIDDEN),
    "self_attn.kv_a_proj_with_mqa": (RANK + ROTATED, HIDDEN),
    "self_attn.kv_a_layernorm": (RANK,),
    "self_attn.kv_b_proj": (HEADS * (PLAIN + VALUE), RANK),
    "self_attn.o_proj": (HIDDEN, HEADS * VALUE),
}
EXPERT_LAYER = {
    "mlp.gate": (EXPERTS, HIDDEN),
    "mlp.experts.0.gate_proj": (EXPERT_INNER, HIDDEN),
    "mlp.shared_experts.gate_proj": (EXPERT_INNER, HIDDEN),
}
LATENT_CONFIG = (
    paper_config("llama", layers=2)
    | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": HEADS}
    | {"kv_lora_rank": RANK, "qk_rope_head_dim": ROTATED, "qk_nope_head_dim": PLAIN, "v_head_dim": VALUE}
    | {"n_routed_experts": EXPERTS, "n_shared_experts": 1, **EXPERT_NUMBERS}
)


def latent_tensors(layers: int = 2) -> Tensors:
    """The first layer dense, the others with experts."""
    found = {index: LATENT_LAYER | (EXPERT_LAYER if index else DENSE) for index in range(layers)}
    return with_layers(paper_tensors("llama"), found)


def test_latent_attention_caches_latents(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, LATENT_CONFIG, latent_tensors())
    assert [layer.kv_bytes_per_token for layer in facts.layers] == [4 * (RANK + ROTATED)] * 2
    assert facts.attention_width >= HEADS * (PLAIN + ROTATED + RANK + ROTATED + VALUE)
    assert facts.mlp_width == INNER


def test_layers_for_training_alone_cost_nothing(tmp_path: Path) -> None:
    plain = facts_of(tmp_path / "plain", LATENT_CONFIG, latent_tensors())
    extra = facts_of(tmp_path / "extra", LATENT_CONFIG | {"num_nextn_predict_layers": 1}, latent_tensors(layers=3))
    assert extra == plain


@pytest.mark.parametrize("count", [0, None, "1", 1 << 60])
def test_only_announced_layers_may_lie_behind_the_last(tmp_path: Path, count: object) -> None:
    config = LATENT_CONFIG | {"num_nextn_predict_layers": count}
    tensors = latent_tensors(layers=3)
    if count == 1 << 60:
        assert facts_of(tmp_path, config, tensors).layer_count == 2
    else:
        assert "they go up to layer 2" in refusal(tmp_path, config, tensors)


def test_latents_of_another_width_than_stated_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, LATENT_CONFIG | {"kv_lora_rank": RANK + 1}, latent_tensors())
    assert f"{RANK + ROTATED + 1} rows follow" in message


FUSED_LAYER = {
    **NORMS,
    "self_attn.qkv_proj": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_up_proj": (2 * INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
FUSED_CONFIG = paper_config("llama", layers=1) | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}


def test_fused_matrices_are_counted(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, FUSED_CONFIG, with_layers(paper_tensors("llama"), {0: FUSED_LAYER}))
    assert facts.layers[0].kv_bytes_per_token == 2 * KV_HEADS * HEAD_DIM * 4


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_longrope_ends_at_its_original_context(tmp_path: Path, spelling: str) -> None:
    """Older configurations state the original context beside the rotation, not within it."""
    config = {key: value for key, value in FUSED_CONFIG.items() if key != "rope_parameters"}
    config |= {spelling: {"type": "longrope"}, "original_max_position_embeddings": 512}
    facts = facts_of(tmp_path, config, with_layers(paper_tensors("llama"), {0: FUSED_LAYER}))
    assert facts.context_tokens == 512


STATE_LAYER = {
    **NORMS,
    **DENSE,
    "linear_attn.conv1d": (CHANNELS, 1, KERNEL),
    "linear_attn.out_proj": (HIDDEN, VALUE_HEADS * VALUE_SIZE),
}
ATTENDING_LAYER = {
    **NORMS,
    **DENSE,
    "self_attn.q_proj": (2 * HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "self_attn.q_norm": (HEAD_DIM,),
    "self_attn.k_norm": (HEAD_DIM,),
}
STATE_CONFIG = (
    paper_config("llama", layers=2)
    | {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]}
    | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": VALUE_HEADS}
    | {"linear_num_key_heads": KEY_HEADS, "linear_key_head_dim": KEY_SIZE, "linear_value_head_dim": VALUE_SIZE}
)
STATE_TENSORS = with_layers(paper_tensors("llama"), {0: STATE_LAYER, 1: ATTENDING_LAYER})


def test_a_state_costs_the_same_for_every_length(tmp_path: Path) -> None:
    """The convolution's last inputs as stored, the memory in float32; other layers cache as ever."""
    facts = facts_of(tmp_path, STATE_CONFIG, STATE_TENSORS)
    first, second = facts.layers
    state_bytes = 4 * CHANNELS * KERNEL + 4 * VALUE_HEADS * KEY_SIZE * VALUE_SIZE
    assert (first.kv_bytes_per_token, first.state_bytes) == (0, state_bytes)
    assert (second.kv_bytes_per_token, second.state_bytes) == (2 * KV_HEADS * HEAD_DIM * 4, 0)
    costs = [
        stage_cost(facts, LayerRange(0, 1), Backend.TORCH, context=context, users=3, on_cpu=True)
        for context in (8, 600, 8000)
    ]
    sequences = 3 * SEQUENCES_PER_USER
    # With one snapshot for each 256 positions, as long as no sequence has more of them than it may.
    snapshots = (0, 3 * 600 // SNAPSHOT_TOKENS, sequences * SNAPSHOTS_MAX)
    assert [cost.kv_bytes for cost in costs] == [(sequences + count) * state_bytes for count in snapshots]


def test_the_promise_counts_sequences_where_each_has_a_cost_of_its_own(tmp_path: Path) -> None:
    """Two short ones keep two windows, or two states, where one long one keeps one."""
    plain = facts_of(tmp_path / "plain", paper_config("llama"), paper_tensors("llama"))
    states = facts_of(tmp_path / "states", STATE_CONFIG, STATE_TENSORS)
    windows = facts_of(tmp_path / "windows", paper_config("gemma3") | {"sliding_window": 8}, paper_tensors("gemma3"))
    assert [sequences_max(facts, 1000, 3) for facts in (plain, states, windows)] == [SEQUENCES_MAX, 6, 6]
    assert sequences_max(windows, 100, 3) == SEQUENCES_MAX  # so short that two windows take as much
    layer = windows.layers[0]
    kept = [
        stage_cost(windows, LayerRange(0, 1), Backend.MLX, context=tokens, users=3, on_cpu=True).kv_bytes
        for tokens in (100, 1000)
    ]
    assert layer.kv_tokens_max == (8 + REWIND_TOKENS) * 9 // 8
    assert kept == [layer.kv_bytes_per_token * 300, layer.kv_bytes_per_token * 6 * layer.kv_tokens_max]


def test_layers_with_a_state_belong_to_families_that_have_them(tmp_path: Path) -> None:
    config = paper_config("llama") | {"layer_types": ["linear_attention"] * 3}
    assert "found linear_attention" in refusal(tmp_path, config, paper_tensors("llama"))


def test_written_scores_need_room(tmp_path: Path) -> None:
    """Soft-caps and sinks: some blocks of all heads' scores, in float32."""
    fused = facts_of(tmp_path / "fused", paper_config("llama"), paper_tensors("llama"))
    tensors = paper_tensors("gemma3")
    written = facts_of(tmp_path / "written", paper_config("gemma3") | {"model_type": "gemma2"}, tensors)
    assert (fused.scores_heads, written.scores_heads) == (0, HEADS)


def test_an_engine_that_cannot_honour_a_setting_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Family("llama", "Llama", frozenset(Backend), (), narrowed={"sliding_window": frozenset({Backend.TORCH})})
    monkeypatch.setitem(families._FAMILIES, "llama", narrow)
    config = paper_config("llama") | {"sliding_window": 8}
    assert facts_of(tmp_path / "one", config, paper_tensors("llama")).backends == {Backend.TORCH}
    assert facts_of(tmp_path / "both", paper_config("llama"), paper_tensors("llama")).backends == set(Backend)
    packed = config | {"quantization": {"bits": 4, "group_size": 16, "mode": "nvfp4"}}
    assert "no engine runs Llama stored as nvfp4; torch computes" in refusal(
        tmp_path / "none", packed, paper_tensors("llama")
    )


def varied_layer(kv_heads: int, head_dim: int, *, has_values: bool) -> dict[str, tuple[int, ...]]:
    rows = kv_heads * head_dim
    layer = {
        **NORMS,
        **DENSE,
        "pre_feedforward_layernorm": (HIDDEN,),
        "post_feedforward_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * head_dim, HIDDEN),
        "self_attn.k_proj": (rows, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * head_dim),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
    }
    return layer | ({"self_attn.v_proj": (rows, HIDDEN)} if has_values else {})


VARIED_CONFIG = paper_config("llama", layers=2) | {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"]}
VARIED_CONFIG |= {"hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"]}


def test_each_layer_caches_as_many_heads_of_the_size_that_it_has(tmp_path: Path) -> None:
    """Keys that serve as values are cached twice: rotated, and not."""
    layers = {0: varied_layer(2, 8, has_values=True), 1: varied_layer(1, 32, has_values=False)}
    facts = facts_of(tmp_path, VARIED_CONFIG, with_layers(paper_tensors("llama"), layers))
    assert [layer.kv_bytes_per_token for layer in facts.layers] == [4 * 2 * 16, 4 * 2 * 32]
    assert facts.attention_width == HEADS * 32 + 2 * 32


def test_keys_are_whole_heads(tmp_path: Path) -> None:
    layer = varied_layer(2, 8, has_values=True) | {"self_attn.k_norm": (7,)}
    message = refusal(tmp_path, VARIED_CONFIG, with_layers(paper_tensors("llama"), {0: layer, 1: layer}))
    assert "layer 0 has keys of shape [16, 16], which are no whole heads" in message


LLAMA4_CONFIG = (
    paper_config("llama", layers=2)
    | {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "num_local_experts": EXPERTS}
    | {"intermediate_size": EXPERT_INNER, "intermediate_size_mlp": INNER, "num_experts_per_tok": 1}
    | {"attention_chunk_size": 8, "no_rope_layers": [1, 0]}
)
LLAMA4_DENSE = {name.replace("mlp.", "feed_forward."): shape for name, shape in DENSE.items()}
LLAMA4_ATTENTION: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
}


def test_one_expert_of_a_llama_4_layer_is_read_and_one_for_every_token(tmp_path: Path) -> None:
    """Experts are stacked, without `.weight`; dense layers have a width of their own."""
    shared = {f"feed_forward.shared_expert.{name}_proj": (EXPERT_INNER, HIDDEN) for name in ("gate", "up", "down")}
    experts = NORMS | LLAMA4_ATTENTION | shared | {"feed_forward.router": (EXPERTS, HIDDEN)}
    tensors = with_layers(paper_tensors("llama"), {0: NORMS | LLAMA4_ATTENTION | LLAMA4_DENSE, 1: experts})
    prefix = "model.layers.1.feed_forward.experts."
    tensors |= {
        f"{prefix}gate_up_proj": (DType.F32, (EXPERTS, HIDDEN, 2 * EXPERT_INNER)),
        f"{prefix}down_proj": (DType.F32, (EXPERTS, EXPERT_INNER, HIDDEN)),
    }
    facts = facts_of(tmp_path, LLAMA4_CONFIG, tensors)
    stack_bytes = 4 * 3 * EXPERTS * HIDDEN * EXPERT_INNER
    (dense, sparse) = facts.layers
    assert sparse.resident_bytes[Backend.MLX] - sparse.streamed_bytes == stack_bytes * (EXPERTS - 1) // EXPERTS
    assert dense.resident_bytes[Backend.MLX] == dense.streamed_bytes
    assert facts.mlp_width == max(INNER, 2 * EXPERT_INNER)
    assert (dense.kv_tokens_max is None, sparse.kv_tokens_max is None) == (False, True)
