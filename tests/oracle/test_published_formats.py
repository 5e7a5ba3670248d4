"""Formats as their publishers write them, on both engines: eight-bit floats as DeepSeek and compressed-tensors store
them, and gpt-oss' own blocks of four bits. Equal to transformers with the same numbers in full precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

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
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, load_pipeline, stage_specs
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, assert_same, decisive_reference
from tests.oracle.test_mlx_families import AS_MLX_LM_COMPUTES_THEM
from tests.oracle.test_mlx_packed import published

BLOCK = (48, 32)  # rows and columns; neither divides all matrices of these checkpoints
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
}
STATED: dict[str, dict[str, Any]] = {
    "blocks": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
    "rows": CHANNELS,
    "whole": {**CHANNELS, "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "tensor"}}}},
}
CASES = [("llama", "blocks"), ("llama", "rows"), ("llama", "whole"), ("qwen3_moe", "blocks"), ("deepseek_v3", "blocks")]

Made = Callable[[str, str], tuple[Path, Path]]


def scaled(matrix: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of eight bits, their scales, and what they stand for; each by its definition, block by block."""
    rows, columns = matrix.shape
    height, width = {"blocks": BLOCK, "rows": (1, columns), "whole": (rows, columns)}[kind]
    codes, exact = torch.empty_like(matrix, dtype=torch.float8_e4m3fn), torch.empty_like(matrix)
    scales = torch.empty(-(-rows // height), -(-columns // width))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = matrix[block].abs().max() / 448
            codes[block] = (matrix[block] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[block] = codes[block].float() * scales[i, j]
    return codes, scales.view(1) if kind == "whole" else scales, exact


def eight_bits(folder: Path, kind: str) -> tuple[Path, Path]:
    """A checkpoint with the linear layers' matrices as eight-bit floats, and the same numbers in full precision."""
    packed, unpacked = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_linear = name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))
        if not is_linear:
            packed[name] = unpacked[name] = tensor
            continue
        packed[name], scales, unpacked[name] = scaled(tensor, kind)
        packed[f"{name}_scale_inv" if kind == "blocks" else f"{name}_scale"] = scales
        if kind != "blocks":  # of activations, which kernels of theirs round as well
            ending = ".input_scale" if kind == "whole" else ".activation_scale"
            packed[name.replace(".weight", ending)] = torch.ones(1)
    targets = folder.with_name("packed"), folder.with_name("unpacked")
    for target, tensors in zip(targets, (packed, unpacked), strict=True):
        target.mkdir()
        config = json.loads((folder / "config.json").read_text())
        if tensors is packed:
            config["quantization_config"] = STATED[kind]
        (target / "config.json").write_text(json.dumps(config))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return targets


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


@pytest.mark.parametrize(("backend", "make"), [(Backend.TORCH, TorchEngine), (Backend.MLX, MlxEngine)])
@pytest.mark.parametrize(("family", "kind"), [*CASES, ("gpt_oss", "mxfp4")])
def test_a_stage_takes_what_the_plan_was_told(family: str, kind: str, backend: Backend, make: type, made: Made) -> None:
    """MLX unpacks eight-bit floats, torch does not; both keep four bits."""
    facts = read_facts(open_checkpoint(made(family, kind)[0]))
    for spec in stage_specs(made(family, kind)[0], (3,)):
        (engine,) = load_pipeline([make], [spec])
        told = stage_cost(facts, spec.layers, backend, context=1, users=1).weight_bytes
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
