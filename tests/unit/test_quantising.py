"""Which weights `--bits` packs, what they take then, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelError, UsageError
from cluster.models.checkpoint import StoredTensor, open_checkpoint
from cluster.models.facts import ModelFacts, read_facts
from cluster.models.families import family_of
from cluster.models.formats import HALF_EXPERTS, Packing, Quantization, readable_formats
from cluster.models.matrices import read_matrices
from cluster.models.quantising import check_bits, inputs_last, is_packed_at_load, packed_at_load
from cluster.types import Backend, DType, Format
from tests.paper_models import Tensors, paper_config, paper_tensors, write_model

LLAMA, _ = family_of({"model_type": "llama"}, "")
EXPERTS, _ = family_of({"model_type": "qwen3_moe"}, "")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (10, 64)),
        ("language_model.lm_head.weight", (10, 64)),
        ("model.embed_tokens_per_layer.weight", (10, 64)),
        ("model.per_layer_model_projection.weight", (10, 64)),
        ("model.layers.0.self_attn.q_proj.weight", (10, 128)),
        ("model.layers.0.linear_attn.in_proj_a.weight", (4, 64)),
        ("model.layers.0.mlp.experts.7.up_proj.weight", (10, 64)),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 10, 64)),
        ("model.layers.0.mlp.switch_mlp.gate_proj.weight", (8, 10, 64)),
    ],
)
def test_matrices_of_linear_layers_ends_and_experts_are_packed(name: str, shape: tuple[int, ...]) -> None:
    assert is_packed_at_load(name, shape, EXPERTS)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (64,)),
        ("model.per_layer_projection_norm.weight", (64,)),
        ("model.layers.0.input_layernorm.weight", (64,)),
        ("model.layers.0.self_attn.q_proj.bias", (64,)),
        ("model.layers.0.self_attn.q_proj.weight", (10, 96)),  # no group divides it
        ("model.layers.0.self_attn.sinks", (64,)),
        ("model.layers.0.self_attn.kv_b_proj.weight", (10, 64)),
        ("model.layers.0.self_attn.embed_q.weight", (4, 10, 64)),
        ("model.layers.0.linear_attn.conv1d.weight", (128, 1, 64)),
        ("model.layers.0.conv.conv.weight", (128, 1, 64)),
        ("model.layers.0.mlp.gate.weight", (8, 64)),  # the router
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64)),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (8, 64)),
        ("vision_tower.layers.0.mlp.fc1.weight", (10, 64)),
        ("model.layers.0.layer_scalar", ()),
        ("model.layers.0.self_attn.q_proj.weight", (10, 0)),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 0, 64)),
    ],
)
def test_all_else_stays_as_it_is_stored(name: str, shape: tuple[int, ...]) -> None:
    assert not is_packed_at_load(name, shape, EXPERTS)


def test_a_gate_that_is_no_router_is_packed() -> None:
    assert is_packed_at_load("model.layers.0.mlp.gate.weight", (8, 64), LLAMA)


HIDDEN, INNER, VOCABULARY = 64, 96, 40


def wide(family: str, dtype: DType = DType.BF16) -> tuple[dict[str, Any], Tensors]:
    """A model on paper whose hidden size is one group, and whose MLPs are no whole number of groups wide."""
    config = paper_config(family) | {"hidden_size": HIDDEN, "intermediate_size": INNER}
    sizes = {16: HIDDEN, 24: INNER}
    tensors = {
        name: (dtype, tuple(sizes.get(extent, extent) for extent in shape) if "norm" not in name else (HIDDEN,))
        for name, (_, shape) in paper_tensors(family).items()
    }
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.k_proj.weight"] = (dtype, (16, HIDDEN))
        tensors[f"model.layers.{layer}.self_attn.v_proj.weight"] = (dtype, (16, HIDDEN))
    return config, tensors


def facts_of(folder: Path, family: str, bits: int | None, **config: object) -> ModelFacts:
    stated, tensors = wide(family)
    return read_facts(open_checkpoint(write_model(folder, stated | config, tensors)), bits)


def packed_bytes(rows: int, columns: int, bits: int) -> int:
    """Codes, and a scale and a bias in 16 bits for every 64 columns."""
    return rows * columns * bits // 8 + rows * columns // 64 * 4


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_facts_count_what_is_packed_as_packed(tmp_path: Path, bits: int) -> None:
    facts = facts_of(tmp_path, "llama", bits)
    assert (facts.bits, facts.quantization) == (bits, Quantization(Packing.AFFINE, bits, 64))
    assert facts.embedding_bytes == facts.head_bytes == VOCABULARY * (64 * bits // 8 + 2 * 2)
    assert facts.norm_bytes == 2 * HIDDEN
    attending = packed_bytes(32 + 16 + 16, HIDDEN, bits) + 2 * HIDDEN * 32  # whose columns are 32
    mlp = packed_bytes(2 * INNER, HIDDEN, bits) + 2 * HIDDEN * INNER
    layer = facts.layers[1]
    assert layer.resident_bytes[Backend.MLX] == attending + mlp + 2 * 2 * HIDDEN
    assert layer.streamed_bytes == layer.resident_bytes[Backend.MLX]


def test_without_bits_nothing_changes(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "llama", None)
    assert (facts.bits, facts.quantization, facts.embedding_bytes) == (None, None, 2 * VOCABULARY * HIDDEN)


def test_a_checkpoint_packed_in_these_bits_stays_as_it_is(tmp_path: Path) -> None:
    stated = {"quantization": {"bits": 4, "group_size": 32}}
    assert facts_of(tmp_path, "llama", 4, **stated).bits is None


@pytest.mark.parametrize(
    "stated",
    [
        {"quantization": {"bits": 8, "group_size": 64}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
    ],
)
def test_a_checkpoint_that_is_packed_otherwise_is_refused(tmp_path: Path, stated: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"the weights are packed already .*leave --bits out, or use the unquantised"):
        facts_of(tmp_path, "llama", 4, **stated)


def test_bits_that_are_none_are_refused() -> None:
    assert [check_bits(bits) for bits in (None, 4, 6, 8)] == [None, 4, 6, 8]
    with pytest.raises(UsageError, match="expected --bits 4, 6 or 8, found 5"):
        check_bits(5)


def test_experts_in_16_bits_are_a_format_of_their_own_until_they_are_packed(tmp_path: Path) -> None:
    """MLX has no kernel for them on a processor."""
    plain = facts_of(tmp_path / "plain", "qwen3_moe", None).formats
    assert plain == {Format(Packing.NONE), HALF_EXPERTS}
    assert not readable_formats(Backend.MLX, "cpu") >= plain
    for backend, device in ((Backend.MLX, "metal"), (Backend.TORCH, "cpu"), (Backend.TORCH, "cuda:0")):
        assert readable_formats(backend, device) >= plain
    config, tensors = wide("qwen3_moe", DType.F32)
    full = read_facts(open_checkpoint(write_model(tmp_path / "full", config, tensors)))
    assert full.formats == {Format(Packing.NONE)}
    for name in tensors:
        if "down_proj" in name:
            tensors[name] = (DType.BF16, (HIDDEN, 64))
    tensors = {name: (DType.BF16, shape) for name, (_, shape) in tensors.items()}
    packed = read_facts(open_checkpoint(write_model(tmp_path / "packed", config, tensors)), 4)
    assert packed.formats == {Format(Packing.NONE), Format(Packing.AFFINE)}


@pytest.mark.parametrize("dtype", [DType.F64, DType.I8, DType.U32])
def test_what_is_no_full_precision_is_not_packed(dtype: DType) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    (plain,) = read_matrices([StoredTensor(name, dtype, (8, 64), "f", 0, 512 * dtype.size_bytes)], None, "").values()
    assert packed_at_load({name: plain}, LLAMA, 4, DType.BF16) == {name: plain}


@pytest.mark.parametrize("shape", [(), (8,), (8, 64), (8, 64, 64), (2, 8, 64, 64)])
def test_stacks_of_any_shape_are_looked_at_without_a_crash(shape: tuple[int, ...]) -> None:
    family, _ = family_of({"model_type": "gpt_oss"}, "")
    name = "model.layers.0.mlp.experts.down_proj"
    assert is_packed_at_load(name, inputs_last(name, shape, family), family) is (len(shape) == 3)
