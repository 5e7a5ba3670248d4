"""Checkpoints as `mlx_lm.convert` writes them, on the torch engine: equal to transformers with the same numbers in
full precision. Which families run so, on either engine and on both, is in `test_packed_families`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the checkpoints are made by mlx-lm")

import mlx.core as mx

from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.placement import stage_cost
from cluster.types import Backend
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from node.engines.torch.packed import Affine
from tests.checkpoints import make_checkpoint
from tests.converted import convert, unconverted
from tests.oracle.company import assert_company_changes_nothing
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, load_pipeline, ragged, run_prefill, stage_specs
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, assert_same, random_prompt

FAMILIES = ("llama", "gemma3", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "qwen3_5", "lfm2", "phi3")
"""Separate and fused matrices, tied heads, experts of three kinds, latents, and states."""

Made = Callable[..., tuple[Path, Path]]
Answers = Callable[..., Reference]


@pytest.mark.parametrize("makers", [(TorchEngine,), (MlxEngine,), (TorchEngine, MlxEngine)])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_four_bit_floats_run_on_both_engines(
    family: str, makers: tuple[type, ...], converted: Made, unpacked_answer: Answers
) -> None:
    expected = unpacked_answer(family, mode="mxfp4")
    engines = load_pipeline(makers, stage_specs(converted(family, 4, "mxfp4")[0], (3,) * (len(makers) - 1)))
    assert_same(*greedy(engines, expected.prompt, len(expected.ids)), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("makers", [(TorchEngine,), (MlxEngine,), (TorchEngine, MlxEngine)])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_widths_and_groups_that_people_use_run_on_both_engines(
    bits: int, group: int, makers: tuple[type, ...], converted: Made, unpacked_answer: Answers
) -> None:
    expected = unpacked_answer("llama", bits=bits, group=group)
    packed, _ = converted("llama", bits, "affine", group)
    engines = load_pipeline(makers, stage_specs(packed, (3,) * (len(makers) - 1)))
    assert_same(*greedy(engines, expected.prompt, len(expected.ids)), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("makers", [(TorchEngine,), (MlxEngine,), (TorchEngine, MlxEngine)])
@pytest.mark.parametrize(("bits", "mode"), [*((bits, "affine") for bits in (2, 3, 4, 5, 6, 8)), (4, "mxfp4")])
def test_neighbours_in_a_step_change_nothing(
    bits: int, mode: str, makers: tuple[type, ...], converted: Made, unpacked_answer: Answers
) -> None:
    expected = unpacked_answer("llama", bits=bits, mode=mode)
    assert_company_changes_nothing(makers, converted("llama", bits, mode)[0], expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_rows_of_a_ragged_batch_share_packed_experts(family: str, converted: Made, unpacked_answer: Answers) -> None:
    expected = [unpacked_answer(family, tokens) for tokens in (11, 40)]
    engines = load_pipeline([TorchEngine] * 2, stage_specs(converted(family)[0], (3,)))
    found = ragged(engines, [reference.prompt for reference in expected], LAST_TOKENS)
    for (ids, logits), reference in zip(found, expected, strict=True):
        assert_same(ids, logits, reference, tolerance=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_converted_in_full_precision_is_read_as_well(family: str, converted: Made) -> None:
    folder, original = converted(family, None)
    prompt = random_prompt(30, seed=1)
    expected = WholeModel(original).logits(prompt)[-1]
    engines = load_pipeline([TorchEngine] * 2, stage_specs(folder, (3,)))
    np.testing.assert_allclose(run_prefill(engines, prompt), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_width_and_group_of_mlx_is_computed(bits: int, group: int, tmp_path: Path) -> None:
    plain = make_checkpoint("llama", tmp_path / "plain", layers=2, hidden_size=128)
    packed = convert(plain, tmp_path / "packed", bits=bits, group=group)
    prompt = random_prompt(20, seed=1)
    expected = WholeModel(unconverted(packed, tmp_path / "unpacked")).logits(prompt)[-1]
    found = run_prefill(load_pipeline([TorchEngine], stage_specs(packed, ())), prompt)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_matrices_with_more_bits_than_stated_are_computed(tmp_path: Path) -> None:
    """Recipes give some matrices more bits, and say so only for these."""
    plain = make_checkpoint("llama", tmp_path / "plain", layers=2)

    def packs(path: str, module: object) -> dict[str, object]:
        return {"group_size": 64, "bits": 6 if "down_proj" in path else 3}

    packed = convert(plain, tmp_path / "packed", bits=3, group=64, packs=packs)
    prompt = random_prompt(20, seed=1)
    expected = WholeModel(unconverted(packed, tmp_path / "unpacked")).logits(prompt)[-1]
    found = run_prefill(load_pipeline([TorchEngine], stage_specs(packed, ())), prompt)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_takes_what_the_plan_was_told(family: str, converted: Made) -> None:
    folder = converted(family)[0]
    facts = read_facts(open_checkpoint(folder))
    for spec in stage_specs(folder, (2, 4)):
        (engine,) = load_pipeline([TorchEngine], [spec])
        told = stage_cost(facts, spec.layers, Backend.TORCH, context=1, users=1, on_cpu=True).weight_bytes
        assert engine.capacity().weight_bytes == told


def with_one_expansion(folder: Path, plain: Path, target: Path) -> Path:
    """What makes keys and values of latents as older conversions hold it: one packed matrix."""
    tensors = dict(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]
    for name in [name for name in tensors if "embed_q." in name or "unembed_out." in name]:
        del tensors[name]
    whole = mx.load(str(plain / "model.safetensors"))
    for name in [name for name in whole if name.endswith("kv_b_proj.weight")]:  # type: ignore[union-attr]
        path = name.removesuffix("weight")
        packed = mx.quantize(whole[name], group_size=32, bits=4)  # type: ignore[call-overload,index]
        tensors |= {f"{path}{part}": array for part, array in zip(("weight", "scales", "biases"), packed, strict=True)}
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), tensors, {"format": "mlx"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


WIDE_LATENTS = {"kv_lora_rank": 64, "qk_nope_head_dim": 32}
"""As many as groups are wide, so that what expands latents is packed as well."""


def test_packed_expansions_of_latents_are_computed(converted: Made) -> None:
    packed, unpacked = converted("deepseek_v3", **WIDE_LATENTS)
    stored = open_checkpoint(packed).tensors
    assert "model.layers.0.self_attn.embed_q.scales" in stored
    assert "model.layers.0.self_attn.unembed_out.scales" in stored
    prompt = random_prompt(30, seed=1)
    found = run_prefill(load_pipeline([TorchEngine] * 2, stage_specs(packed, (3,))), prompt, (17,))
    np.testing.assert_allclose(found, WholeModel(unpacked).logits(prompt)[-1], rtol=0, atol=TOLERANCE)


def test_an_older_conversion_of_latents_runs_on_torch_and_is_refused_by_mlx(converted: Made, tmp_path: Path) -> None:
    """mlx-lm would take the matrix apart and pack the parts anew, which gives other numbers."""
    packed = converted("deepseek_v3", **WIDE_LATENTS)[0]
    folder = with_one_expansion(packed, packed.with_name("plain"), tmp_path / "older")
    assert read_facts(open_checkpoint(folder)).backends == {Backend.TORCH}
    prompt = random_prompt(30, seed=1)
    expected = WholeModel(unconverted(folder, tmp_path / "unpacked")).logits(prompt)[-1]
    found = run_prefill(load_pipeline([TorchEngine] * 2, stage_specs(folder, (3,))), prompt)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(ModelError, match=r"MLX does not compute .*kv_b_proj"):
        load_pipeline([MlxEngine], stage_specs(folder, ()))


MUTANTS = {
    "a group's scale is its neighbour's": lambda m: Affine(m.codes, m.scales.roll(1, -1), m.biases, m.bits),
    "no biases": lambda m: Affine(m.codes, m.scales, m.biases * 0, m.bits),
    "a row's codes are its neighbour's": lambda m: Affine(m.codes.roll(1, 0), m.scales, m.biases, m.bits),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name: str, converted: Made, unpacked_answer: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    values = Affine.values
    monkeypatch.setattr(Affine, "values", lambda matrix: values(MUTANTS[name](matrix)))
    expected = unpacked_answer("llama")
    engines = load_pipeline([TorchEngine] * 2, stage_specs(converted("llama")[0], (3,)))
    with pytest.raises(AssertionError):
        assert_same(*greedy(engines, expected.prompt, 8), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "bits"), [("llama", 4), ("gemma3", 4), ("qwen3_moe", 4), ("gemma3", 6), ("llama", 8), ("qwen3_moe", 8)]
)
def test_in_bfloat16_it_is_as_exact_as_transformers_on_the_unpacked_weights(
    family: str, bits: int, tmp_path: Path
) -> None:
    """By the CPU's own kernel: compared with the same numbers in float32, whatever rounds them."""
    plain = make_checkpoint(family, tmp_path / "plain", dtype="bfloat16")
    packed = convert(plain, tmp_path / "packed", bits=bits, group=64)
    prompt = random_prompt(40, seed=1)
    in_float32 = WholeModel(unconverted(packed, tmp_path / "exact")).in_float32().logits(prompt)
    rounded = mx.load(str(tmp_path / "exact" / "model.safetensors"))
    mx.save_safetensors(
        str(tmp_path / "exact" / "model.safetensors"),
        {name: array.astype(mx.bfloat16) for name, array in rounded.items()},  # type: ignore[union-attr]
        {"format": "pt"},
    )
    theirs = WholeModel(tmp_path / "exact").logits(prompt)
    ours = run_prefill(load_pipeline([TorchEngine], stage_specs(packed, ())), prompt)
    assert np.abs(ours - in_float32[-1]).max() <= 1.5 * np.abs(theirs - in_float32).max()
