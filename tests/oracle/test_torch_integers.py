"""AWQ, GPTQ and compressed-tensors checkpoints on the torch engine, against transformers on the dequantised weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.quantities import MIB
from cluster.types import Backend
from node.engines.torch import repack
from node.engines.torch.products import Whole
from tests.checkpoints import make_checkpoint
from tests.integer_checkpoints import LAYOUTS, quantised_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, run_prefill
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, assert_same, decisive_reference
from tests.oracle.test_torch_engine import torch_pipeline

ON_THEIR_WAY_BYTES = 16 * MIB
"""Codes that change places, part by part, and what one matrix was read into: no more of them in larger models."""

Integers = Callable[[str, str], tuple[Path, Reference]]


def assert_equal_pipeline(packed: Path, cuts: tuple[int, ...], expected: Reference) -> None:
    engines = torch_pipeline(packed, cuts)
    assert_same(*greedy(engines, expected.prompt, len(expected.ids), chunks=(17,)), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llama_in_every_layout_equals_the_dequantised_model(layout: str, integers: Integers) -> None:
    packed, expected = integers("llama", layout)
    assert_equal_pipeline(packed, (1, 2), expected)


@pytest.mark.parametrize("cuts", [(), (2,)])
@pytest.mark.parametrize("layout", ["awq", "gptq_act_order", "compressed"])
def test_experts_in_every_format_equal_the_dequantised_model(
    layout: str, cuts: tuple[int, ...], integers: Integers
) -> None:
    packed, expected = integers("qwen3_moe", layout)
    assert_equal_pipeline(packed, cuts, expected)


@pytest.mark.parametrize("family", ["gemma3", "phi3", "deepseek_v3", "qwen3_next"])
def test_other_families_equal_the_dequantised_model(family: str, integers: Integers) -> None:
    packed, expected = integers(family, "awq")
    assert_equal_pipeline(packed, (2,), expected)


@pytest.mark.parametrize("layout", ["awq", "gptq_act_order"])
def test_what_expands_latents_may_be_packed(layout: str, tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek_v3", tmp_path / "deepseek", layers=3, kv_lora_rank=64)
    packed, unpacked = quantised_checkpoint(folder, layout)
    assert "model.layers.0.self_attn.kv_b_proj.qweight" in open_checkpoint(packed).tensors
    model = WholeModel(unpacked)
    expected = decisive_reference(model, prompt_tokens=40, count=LAST_TOKENS, tolerance=TOLERANCE)
    assert_equal_pipeline(packed, (), expected)


def farthest(packed: Path, expected: Reference) -> float:
    logits = run_prefill(torch_pipeline(packed), expected.prompt)
    return float(np.abs(logits - expected.logits[0]).max())


def test_a_wrong_order_of_codes_is_seen(integers: Integers, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, expected = integers("llama", "awq")
    assert farthest(packed, expected) < TOLERANCE
    monkeypatch.setattr(repack, "AWQ_ORDER", tuple(range(8)))
    assert farthest(packed, expected) > 20 * TOLERANCE


def test_zeros_that_are_off_by_one_are_seen(integers: Integers, tmp_path: Path) -> None:
    packed, expected = integers("llama", "gptq")
    assert farthest(packed, expected) < TOLERANCE
    packed = Path(shutil.copytree(packed, tmp_path / "copy"))
    path = packed / "config.json"
    path.write_text(path.read_text().replace('"checkpoint_format": "gptq"', '"checkpoint_format": "gptq_v2"'))
    assert farthest(packed, expected) > 20 * TOLERANCE


def test_columns_out_of_order_are_seen(integers: Integers, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, expected = integers("llama", "gptq_act_order")
    product = Whole.product

    def in_file_order(matrix: Whole, x: torch.Tensor) -> torch.Tensor:
        matrix.order = None
        return product(matrix, x)

    monkeypatch.setattr(Whole, "product", in_file_order)
    assert farthest(packed, expected) > 20 * TOLERANCE


@pytest.mark.parametrize("layout", ["awq", "gptq_act_order"])
def test_numbers_are_those_of_float32_rounded_once(layout: str, tmp_path: Path) -> None:
    """Scales of float16 in a model of bfloat16, which cannot hold them."""
    folder = make_checkpoint("llama", tmp_path / "llama", layers=1, dtype="bfloat16")
    packed, unpacked = quantised_checkpoint(folder, layout)
    (engine,) = torch_pipeline(packed)
    attention = engine._loaded().sliced.model.model.layers[0].self_attn  # type: ignore[attr-defined]
    expected = load_file(unpacked / "model.safetensors")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = getattr(attention, name).weight
        assert torch.equal(weight.unpacked(0, weight.shape[0]), expected[f"model.layers.0.self_attn.{name}.weight"])


@pytest.mark.parametrize("layout", ["awq", "awq_64", "gptq_act_order", "compressed_16bit", "compressed_channel"])
@pytest.mark.parametrize(("family", "overrides"), [("llama", {}), ("qwen3_moe", {"moe_intermediate_size": 64})])
def test_plans_count_what_the_engine_holds(family: str, overrides: dict[str, int], layout: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path / family, layers=3, dtype="float16", **overrides)
    packed, _ = quantised_checkpoint(folder, layout)
    facts = read_facts(open_checkpoint(packed))
    (engine,) = torch_pipeline(packed)
    layers = sum(layer.resident_bytes[Backend.TORCH] for layer in facts.layers)
    planned = layers + facts.embedding_bytes + facts.norm_bytes + facts.head_bytes
    assert engine.capacity().weight_bytes == planned
    assert planned < 0.7 * read_facts(open_checkpoint(folder)).stored_bytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_load_needs_little_more_memory_than_its_slice(tmp_path: Path) -> None:
    """Eight of sixteen layers; they are alike, since quantising takes longest here."""
    one = make_checkpoint(
        "llama", tmp_path / "one", layers=1, hidden_size=1024, intermediate_size=3072, dtype="float16"
    )
    folder, _ = quantised_checkpoint(one, "awq")
    tensors = load_file(folder / "model.safetensors")
    layer = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    for index in range(1, 16):
        tensors |= {name.replace(".0.", f".{index}.", 1): tensor.clone() for name, tensor in layer.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 16}))
    warm, _ = quantised_checkpoint(make_checkpoint("llama", tmp_path / "warm"), "awq")
    output = subprocess.run(
        [sys.executable, "-m", "tests.oracle.peak_memory", str(folder), str(warm)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    ).stdout
    growth_bytes, slice_bytes = map(int, output.split())
    assert slice_bytes > 40e6
    assert 0.95 * slice_bytes <= growth_bytes <= 1.10 * slice_bytes + ON_THEIR_WAY_BYTES


def test_biases_of_zeros_that_a_model_does_not_have_are_left_out(integers: Integers, tmp_path: Path) -> None:
    packed, expected = integers("llama", "gptq")
    packed = Path(shutil.copytree(packed, tmp_path / "copy"))
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.bias"
    save_file(tensors | {name: torch.zeros(32, dtype=torch.float16)}, packed / "model.safetensors")
    assert greedy(torch_pipeline(packed), expected.prompt, 8)[0] == expected.ids[:8]
    save_file(tensors | {name: torch.ones(32, dtype=torch.float16)}, packed / "model.safetensors")
    with pytest.raises(ModelError, match=r"k_proj.bias' is not zero, and the model has no such bias"):
        torch_pipeline(packed)
