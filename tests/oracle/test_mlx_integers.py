"""AWQ, GPTQ and compressed-tensors checkpoints on the MLX engine, against transformers on the dequantised weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.types import Backend
from node.engines.mlx import repack
from node.engines.mlx.engine import MlxEngine
from node.engines.mlx.exact import ExactLinear, ExactSwitchLinear
from tests.checkpoints import make_checkpoint
from tests.integer_checkpoints import LAYOUTS, quantised_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, run_prefill, stage_specs
from tests.oracle.reference import Reference
from tests.oracle.test_mlx_engine import mlx_pipeline
from tests.oracle.test_mlx_families import assert_like_transformers

Integers = Callable[[str, str], tuple[Path, Reference]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llama_in_every_layout_equals_the_dequantised_model(layout: str, integers: Integers) -> None:
    packed, expected = integers("llama", layout)
    assert_like_transformers(mlx_pipeline(packed, (1, 2)), [expected])


@pytest.mark.parametrize("layout", ["awq", "gptq_act_order", "compressed"])
def test_experts_in_every_format_equal_the_dequantised_model(layout: str, integers: Integers) -> None:
    packed, expected = integers("qwen3_moe", layout)
    assert_like_transformers(mlx_pipeline(packed, (2,)), [expected])


@pytest.mark.parametrize("family", ["gemma3", "phi3", "deepseek_v3", "qwen3_next"])
def test_other_families_equal_the_dequantised_model(family: str, integers: Integers) -> None:
    packed, expected = integers(family, "awq")
    assert_like_transformers(mlx_pipeline(packed, (2,)), [expected])


def farthest(packed: Path, expected: Reference) -> float:
    logits = run_prefill(mlx_pipeline(packed, ()), expected.prompt)
    return float(np.abs(logits - expected.logits[0]).max())


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def test_a_wrong_order_of_codes_is_seen(integers: Integers, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, expected = integers("llama", "awq")
    assert farthest(packed, expected) < TOLERANCE
    monkeypatch.setattr(repack, "AWQ_ORDER", tuple(range(8)))
    assert farthest(packed, expected) > 20 * TOLERANCE


def test_zeros_that_are_off_by_one_are_seen(integers: Integers, tmp_path: Path) -> None:
    packed, expected = integers("llama", "gptq")
    assert farthest(packed, expected) < TOLERANCE
    packed = copy_of(packed, tmp_path)
    path = packed / "config.json"
    path.write_text(path.read_text().replace('"checkpoint_format": "gptq"', '"checkpoint_format": "gptq_v2"'))
    assert farthest(packed, expected) > 20 * TOLERANCE


@pytest.mark.parametrize("layout", ["awq", "awq_64", "gptq_act_order", "compressed_16bit", "compressed_channel"])
@pytest.mark.parametrize(("family", "overrides"), [("llama", {}), ("qwen3_moe", {"moe_intermediate_size": 64})])
def test_plans_count_what_the_engine_holds(family: str, overrides: dict[str, int], layout: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path / family, layers=3, dtype="float16", **overrides)
    packed, _ = quantised_checkpoint(folder, layout)
    facts = read_facts(open_checkpoint(packed))
    (engine,) = mlx_pipeline(packed, ())
    layers = sum(layer.resident_bytes[Backend.MLX] for layer in facts.layers)
    planned = layers + facts.embedding_bytes + facts.norm_bytes + facts.head_bytes
    assert engine.capacity().weight_bytes == planned
    assert planned < 0.7 * read_facts(open_checkpoint(folder)).stored_bytes


def test_values_are_read_only_after_they_have_arrived(integers: Integers, tmp_path: Path) -> None:
    """Whatever arrives late reads as zeros before: orders, zeros and stray biases as well."""
    packed, expected = integers("llama", "gptq_act_order")
    packed = copy_of(packed, tmp_path)
    whole, path = (packed / "model.safetensors").read_bytes(), packed / "model.safetensors"
    begin = min(tensor.begin for tensor in open_checkpoint(packed).tensors.values())
    path.write_bytes(whole[:begin] + bytes(len(whole) - begin))

    def arrive(_names: Iterable[str]) -> None:
        with path.open("r+b") as file:
            file.write(whole)

    (spec,) = stage_specs(packed, ())
    engine = MlxEngine()
    engine.load(replace(spec, await_tensors=arrive), lambda progress: None)
    assert greedy([engine], expected.prompt, 8)[0] == expected.ids[:8]


@pytest.mark.parametrize(("layout", "is_exact"), [("awq", True), ("compressed_16bit", False)])
def test_scales_wider_than_the_model_are_multiplied_in_float32(layout: str, is_exact: bool, tmp_path: Path) -> None:
    """A bias that float16 cannot hold is rounded nowhere; one that it holds costs nothing."""
    folder = make_checkpoint("qwen3_moe", tmp_path / "moe", layers=1, dtype="float16")
    (engine,) = mlx_pipeline(quantised_checkpoint(folder, layout)[0], ())
    layer = engine._loaded.sliced.model.model.layers[0]  # type: ignore[attr-defined]
    assert isinstance(layer.self_attn.q_proj, ExactLinear) is is_exact
    assert isinstance(layer.mlp.switch_mlp.up_proj, QuantizedSwitchLinear)
    assert isinstance(layer.mlp.switch_mlp.up_proj, ExactSwitchLinear) is is_exact
    assert layer.mlp.switch_mlp.up_proj.scales.dtype == (mx.float32 if is_exact else mx.float16)


def test_biases_of_zeros_that_a_model_does_not_have_are_left_out(integers: Integers, tmp_path: Path) -> None:
    packed, expected = integers("llama", "gptq")
    packed = copy_of(packed, tmp_path)
    tensors = dict(mx.load(str(packed / "model.safetensors")))
    name = "model.layers.1.self_attn.k_proj.bias"
    mx.save_safetensors(str(packed / "model.safetensors"), tensors | {name: mx.zeros((32,), mx.float16)})
    ids, _ = greedy(mlx_pipeline(packed, ()), expected.prompt, 8)
    assert ids == expected.ids[:8]
    mx.save_safetensors(str(packed / "model.safetensors"), tensors | {name: mx.ones((32,), mx.float16)})
    with pytest.raises(ModelError, match=r"k_proj.bias is not zero, and the model has no such bias"):
        mlx_pipeline(packed, ())


def test_what_expands_latents_is_refused_in_codes(tmp_path: Path) -> None:
    """mlx-lm takes that matrix apart, which for codes means something else. torch computes with it."""
    folder = make_checkpoint("deepseek_v3", tmp_path / "deepseek", layers=2, kv_lora_rank=32, qk_nope_head_dim=32)
    packed, _ = quantised_checkpoint(folder, "awq")
    assert "model.layers.0.self_attn.kv_b_proj.qweight" in open_checkpoint(packed).tensors
    assert read_facts(open_checkpoint(packed)).backends == {Backend.TORCH}
    with pytest.raises(ModelError, match=r"mlx-lm takes model.layers.0.self_attn.kv_b_proj.weight apart"):
        mlx_pipeline(packed, ())
