"""The small Gemma 4: layers with inputs of their own, and layers without keys of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.placement import stage_cost
from cluster.placement.costs import CostTable
from cluster.types import Backend, DType, LayerRange, TensorSpec
from tests.paper_models import HEADS, HIDDEN, VOCABULARY, Tensors, paper_tensors
from tests.unit.test_facts_families import VARIED_CONFIG, facts_of, refusal, varied_layer, with_layers

WIDTH, HEAD = 6, 8
CONFIG = VARIED_CONFIG | {
    "num_hidden_layers": 3,
    "layer_types": ["full_attention"] * 3,
    "hidden_size_per_layer_input": WIDTH,
    "num_kv_shared_layers": 1,
}
OWN_INPUT = {
    "per_layer_input_gate": (WIDTH, HIDDEN),
    "per_layer_projection": (HIDDEN, WIDTH),
    "post_per_layer_input_norm": (HIDDEN,),
}
KEYED = varied_layer(2, HEAD, has_values=True) | OWN_INPUT
KEYLESS = {name: shape for name, shape in KEYED.items() if name[:11] not in ("self_attn.k", "self_attn.v")}
MAKERS: Tensors = {
    "model.embed_tokens_per_layer.weight": (DType.F32, (VOCABULARY, 3 * WIDTH)),
    "model.per_layer_model_projection.weight": (DType.F32, (3 * WIDTH, HIDDEN)),
    "model.per_layer_projection_norm.weight": (DType.F32, (WIDTH,)),
}
TABLE_BYTES, STREAMED_BYTES = 4 * VOCABULARY * 3 * WIDTH, 4 * (3 * WIDTH * HIDDEN + WIDTH)


def tensors_with(last: dict[str, tuple[int, ...]] = KEYLESS) -> Tensors:
    return with_layers(paper_tensors("llama"), {0: KEYED, 1: KEYED, 2: last}) | MAKERS


def test_layers_without_keys_of_their_own_cache_nothing(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, CONFIG, tensors_with())
    assert [layer.kv_bytes_per_token for layer in facts.layers] == [4 * 2 * 2 * HEAD] * 2 + [0]
    assert facts.legal_cuts == {0, 1}
    assert facts.attention_width == (HEADS + 2 * 2) * HEAD


def test_keys_that_nobody_uses_cost_nothing_and_go_nowhere(tmp_path: Path) -> None:
    """As published: the layers that share keys have some of their own in the files."""
    lean = facts_of(tmp_path / "lean", CONFIG, tensors_with())
    assert facts_of(tmp_path / "full", CONFIG, tensors_with(KEYED)) == lean
    owned = owned_tensors(open_checkpoint(tmp_path / "full"), LayerRange(1, 3), 3)
    assert not [tensor.name for tensor in owned if tensor.name.startswith("model.layers.2.self_attn.k_")]
    assert [tensor.name for tensor in owned if tensor.name.startswith("model.layers.1.self_attn.k_")]


def test_all_layers_inputs_cross_a_boundary(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, CONFIG, tensors_with())
    assert facts.boundary == (
        TensorSpec("hidden", (HIDDEN,), DType.F32),
        TensorSpec("layer_inputs", (3, WIDTH), DType.F32),
    )


def test_the_first_stage_alone_makes_them(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, CONFIG, tensors_with())
    assert facts.inputs_bytes == TABLE_BYTES + STREAMED_BYTES
    plain = facts_of(
        tmp_path / "plain",
        CONFIG | {"hidden_size_per_layer_input": 0},
        {name: tensor for name, tensor in tensors_with().items() if "per_layer" not in name},
    )
    own_bytes = 4 * (2 * WIDTH * HIDDEN + HIDDEN)
    for layers, added in ((LayerRange(0, 1), facts.inputs_bytes), (LayerRange(1, 3), 0)):
        costs = [stage_cost(each, layers, Backend.TORCH, context=8, users=1, on_cpu=True) for each in (facts, plain)]
        assert costs[0].weight_bytes - costs[1].weight_bytes == len(layers) * own_bytes + added
        streamed = len(layers) * own_bytes + (STREAMED_BYTES if added else 0)
        assert costs[0].streamed_bytes - costs[1].streamed_bytes == streamed
        assert costs[0].workspace_bytes > costs[1].workspace_bytes
        names = {tensor.name for tensor in owned_tensors(open_checkpoint(tmp_path), layers, 3)}
        assert (names >= MAKERS.keys()) == bool(added)
        assert names.isdisjoint(MAKERS) == (not added)


def test_tables_and_formula_agree(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, CONFIG, tensors_with())
    table = CostTable(facts, context=8, users=2)
    for begin, end, layers in ((0, 1, LayerRange(0, 1)), (1, 2, LayerRange(1, 3)), (0, 2, LayerRange(0, 3))):
        cost = stage_cost(facts, layers, Backend.MLX, context=8, users=2, on_cpu=True)
        assert table.memory(Backend.MLX, True)[begin, end] == cost.memory_bytes
        assert table.streamed[begin, end] == cost.streamed_bytes


@pytest.mark.parametrize("name", MAKERS)
def test_what_makes_inputs_has_to_be_there(name: str, tmp_path: Path) -> None:
    tensors = {other: tensor for other, tensor in tensors_with().items() if other != name}
    assert name.removeprefix("model.") in refusal(tmp_path, CONFIG, tensors)


def test_every_token_has_inputs(tmp_path: Path) -> None:
    short = {"model.embed_tokens_per_layer.weight": (DType.F32, (VOCABULARY - 1, 3 * WIDTH))}
    assert f"{VOCABULARY - 1} rows" in refusal(tmp_path, CONFIG, tensors_with() | short)


def test_silence_means_that_layers_have_inputs(tmp_path: Path) -> None:
    """To both libraries."""
    config = {name: value for name, value in CONFIG.items() if name != "hidden_size_per_layer_input"}
    plain = varied_layer(2, HEAD, has_values=True)
    tensors = with_layers(paper_tensors("llama"), dict.fromkeys(range(3), plain))
    assert "embed_tokens_per_layer.weight" in refusal(tmp_path, config, tensors)


def test_a_last_layer_with_a_window_is_refused(tmp_path: Path) -> None:
    """The library computes it without one, whatever is stated."""
    config = CONFIG | {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}
    assert "full_attention as the last" in refusal(tmp_path, config, tensors_with())


def test_other_families_do_not_share_keys(tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "llama"}
    assert "expected Llama layers with keys of their own" in refusal(tmp_path, config, tensors_with())
