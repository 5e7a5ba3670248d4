"""Formats as their publishers write them, on both engines: eight-bit floats as DeepSeek and compressed-tensors store
them, and gpt-oss' own blocks of four bits. Equal to transformers with the same numbers in full precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.placement import stage_cost
from cluster.types import Backend
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from node.engines.torch.packed import Fp8, Mxfp4
from tests.checkpoints import make_checkpoint
from tests.eight_bit_checkpoints import LAYOUTS, eight_bits
from tests.oracle.company import assert_company_changes_nothing
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, load_pipeline, stage_specs
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, assert_same, decisive_reference
from tests.oracle.test_mlx_families import AS_MLX_LM_COMPUTES_THEM
from tests.oracle.test_mlx_packed import published

CASES = [*(("llama", kind) for kind in LAYOUTS), ("qwen3_moe", "blocks"), ("deepseek_v3", "blocks")]

Made = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def make(family: str, kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(family)
        plain = make_checkpoint(family, folder / family, **AS_MLX_LM_COMPUTES_THEM.get(family, {}))
        return published(plain) if kind == "mxfp4" else eight_bits(plain, kind)

    return make


@pytest.fixture(scope="module")
def answer(made: Made) -> Callable[[str, str], Reference]:
    @cache
    def make(family: str, kind: str) -> Reference:
        whole = WholeModel(made(family, kind)[1])
        return decisive_reference(whole, prompt_tokens=40, count=LAST_TOKENS, tolerance=TOLERANCE)

    return make


@pytest.mark.parametrize(
    "makers", [(TorchEngine,), (MlxEngine,), (TorchEngine, TorchEngine, TorchEngine), (TorchEngine, MlxEngine)]
)
@pytest.mark.parametrize(("family", "kind"), [*CASES, ("gpt_oss", "mxfp4")])
def test_it_equals_transformers_on_the_unpacked_weights(
    family: str, kind: str, makers: tuple[type, ...], made: Made, answer: Callable[[str, str], Reference]
) -> None:
    expected = answer(family, kind)
    engines = load_pipeline(makers, stage_specs(made(family, kind)[0], {1: (), 2: (3,), 3: (2, 4)}[len(makers)]))
    assert_same(*greedy(engines, expected.prompt, len(expected.ids), chunks=(17,)), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("makers", [(TorchEngine,), (MlxEngine,), (TorchEngine, MlxEngine)])
@pytest.mark.parametrize(("family", "kind"), [*CASES, ("gpt_oss", "mxfp4")])
def test_neighbours_in_a_step_change_nothing(
    family: str, kind: str, makers: tuple[type, ...], made: Made, answer: Callable[[str, str], Reference]
) -> None:
    assert_company_changes_nothing(makers, made(family, kind)[0], answer(family, kind))


@pytest.mark.parametrize(("backend", "make"), [(Backend.TORCH, TorchEngine), (Backend.MLX, MlxEngine)])
@pytest.mark.parametrize(("family", "kind"), [*CASES, ("gpt_oss", "mxfp4")])
def test_a_stage_takes_what_the_plan_was_told(family: str, kind: str, backend: Backend, make: type, made: Made) -> None:
    """MLX unpacks eight-bit floats, torch does not; both keep four bits."""
    facts = read_facts(open_checkpoint(made(family, kind)[0]))
    for spec in stage_specs(made(family, kind)[0], (3,)):
        (engine,) = load_pipeline([make], [spec])
        told = stage_cost(facts, spec.layers, backend, context=1, users=1, on_cpu=True).weight_bytes
        assert engine.capacity().weight_bytes == told


def neighbours(scales: torch.Tensor) -> torch.Tensor:
    return scales.roll(1, -1) if scales.shape[-1] > 1 else scales.roll(1, 0)


@pytest.mark.parametrize(("family", "kind"), [("llama", "blocks"), ("llama", "rows"), ("gpt_oss", "mxfp4")])
def test_scales_of_a_neighbour_fail(
    family: str, kind: str, made: Made, answer: Callable[[str, str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Mxfp4 if kind == "mxfp4" else Fp8
    values = form.values
    monkeypatch.setattr(form, "values", lambda matrix: values(replace(matrix, scales=neighbours(matrix.scales))))
    expected = answer(family, kind)
    engines = load_pipeline([TorchEngine], stage_specs(made(family, kind)[0], ()))
    with pytest.raises(AssertionError):
        assert_same(*greedy(engines, expected.prompt, 8), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("make", [TorchEngine, MlxEngine])
@pytest.mark.parametrize("shape", [(5, 5), (64,), (2, 2, 2)])
def test_scales_that_do_not_fit_are_refused(make: type, shape: tuple[int, ...], made: Made, tmp_path: Path) -> None:
    packed = made("llama", "blocks")[0]
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale_inv"] = torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    with pytest.raises(ModelError, match="but its scales have shape"):
        load_pipeline([make], stage_specs(tmp_path, ()))
