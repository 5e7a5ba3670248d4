"""Names tell parts, and stages together own every tensor that a text model computes with."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.models.checkpoint import Checkpoint, open_checkpoint
from cluster.models.layout import (
    Embedding,
    Head,
    Layer,
    LayerInputs,
    Norm,
    Part,
    Unused,
    head_is_tied,
    owned_tensors,
    part_of,
)
from cluster.types import LayerRange
from tests.paper_models import paper_config, paper_tensors, write_model, write_paper_model


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", Embedding()),
        ("model.embed_tokens.scales", Embedding()),
        ("model.layers.0.mlp.up_proj.biases", Layer(0)),
        ("model.layers.17.self_attn.q_proj.bias", Layer(17)),
        ("model.norm.weight", Norm()),
        ("model.language_model.embed_tokens_per_layer.weight", LayerInputs("embed_tokens_per_layer")),
        ("language_model.model.per_layer_model_projection.scales", LayerInputs("per_layer_model_projection")),
        ("model.per_layer_projection_norm.weight", LayerInputs("per_layer_projection_norm")),
        ("model.layers.3.per_layer_projection.weight", Layer(3)),
        ("model.embedding_norm.weight", Norm()),
        ("mtp.norm.weight", Unused()),
        ("lm_head.weight", Head()),
        ("language_model.model.layers.3.input_layernorm.weight", Layer(3)),
        ("model.language_model.layers.3.input_layernorm.weight", Layer(3)),
        ("model.language_model.norm.weight", Norm()),
        ("language_model.lm_head.scales", Head()),
        ("vision_tower.vision_model.encoder.layers.3.layer_norm1.weight", Unused()),
        ("model.vision_tower.encoder.layers.3.layer_norm1.weight", Unused()),
        ("vision_tower.embeddings.patch_embedding.weight", Unused()),
        ("multi_modal_projector.mm_soft_emb_norm.weight", Unused()),
        ("model.layers.2.self_attn.rotary_emb.inv_freq", Unused()),
        ("model.layers.03.mlp.up_proj.weight", Unused()),
        ("model.layers.-1.mlp.up_proj.weight", Unused()),
        (f"model.layers.{'9' * 5000}.mlp.up_proj.weight", Unused()),
        ("model.layers.1", Unused()),
        ("", Unused()),
    ],
)
def test_part_of(name: str, part: Part) -> None:
    assert part_of(name) == part


def names(checkpoint: Checkpoint, first: int, last: int) -> set[str]:
    return {tensor.name for tensor in owned_tensors(checkpoint, LayerRange(first, last), 3)}


def test_the_ends_go_with_the_first_and_the_last_layer(tmp_path: Path) -> None:
    found = open_checkpoint(write_paper_model(tmp_path, "llama"))
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names(found, 0, 1) & ends == {"model.embed_tokens.weight"}
    assert names(found, 1, 2) & ends == set()
    assert names(found, 2, 3) & ends == {"model.norm.weight", "lm_head.weight"}


def test_a_tied_head_brings_the_embedding_to_the_last_layer(tmp_path: Path) -> None:
    found = open_checkpoint(write_paper_model(tmp_path, "gemma3"))
    ends = {"model.embed_tokens.weight", "model.norm.weight"}
    assert [names(found, i, i + 1) & ends for i in range(3)] == [{"model.embed_tokens.weight"}, set(), ends]


def test_a_stored_head_of_a_tied_model_is_nobodys(tmp_path: Path) -> None:
    config = paper_config("llama") | {"tie_word_embeddings": True}
    found = open_checkpoint(write_model(tmp_path, config, paper_tensors("llama")))
    assert "lm_head.weight" not in names(found, 0, 3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gemma3"])
def test_stages_own_everything_and_layers_only_once(tmp_path: Path, family: str) -> None:
    found = open_checkpoint(write_paper_model(tmp_path, family))
    owned = [names(found, 0, 2), names(found, 2, 3)]
    assert owned[0] | owned[1] == set(found.tensors)
    assert owned[0] & owned[1] == ({"model.embed_tokens.weight"} if family == "gemma3" else set())


def test_owned_tensors_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = owned_tensors(open_checkpoint(write_paper_model(tmp_path)), LayerRange(0, 3), 3)
    assert [tensor.begin for tensor in found] == sorted(tensor.begin for tensor in found)


@pytest.mark.parametrize(
    ("config", "has_head", "tied"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": False}, False, False),
        ({"text_config": {"tie_word_embeddings": False}}, False, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, False, True),
        ({}, True, False),
        ({}, False, True),
    ],
)
def test_tied_as_the_configuration_says_or_else_as_the_files_show(
    tmp_path: Path, config: dict[str, object], has_head: bool, tied: bool
) -> None:
    tensors = paper_tensors("llama" if has_head else "gemma3")
    assert head_is_tied(open_checkpoint(write_model(tmp_path, config, tensors))) is tied
