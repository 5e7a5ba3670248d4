"""Packed formats of the newer families on the MLX engine, against whole models and unpacked weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from tests.checkpoints import make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.mlx_reference import as_mlx_lm_stores_it, mlx_reference, whole_mlx_model
from tests.oracle.pipelines import greedy
from tests.oracle.reference import LAST_TOKENS, WholeModel, decisive_reference
from tests.oracle.test_mlx_engine import assert_equal, assert_ragged_batch_equal, mlx_pipeline
from tests.oracle.test_mlx_families import AS_MLX_LM_COMPUTES_THEM, assert_like_transformers

Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The checkpoint of a family that mlx-lm computes as transformers does."""

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("plain") / family
        return make_checkpoint(family, folder, **AS_MLX_LM_COMPUTES_THEM.get(family, {}))

    return make


def four_bit(folder: Path, mode: str = "affine", only: str = "") -> Path:
    """The checkpoint packed as mlx-lm does it, except for one layer's attention; or of every layer a part `only`."""
    model, config = load_model(as_mlx_lm_stores_it(folder), model_config=dict(whole_mlx_model(folder).stated))
    spared = "layers.2.self_attn"

    def packs(path: str, module: Any) -> bool:
        return bool(module.weight.shape[-1] % 32 == 0) and only in path and spared not in path

    model, config = quantize_model(model, config, group_size=32, bits=4, mode=mode, quant_predicate=packs)
    target = folder.with_name(f"{folder.name}_4bit_{mode}")
    target.mkdir()
    save_model(target, model)
    save_config(config, target / "config.json")
    return target


@pytest.mark.parametrize("family", ["phi3", "gpt_oss", "deepseek_v3"])
def test_four_bit_checkpoints_equal_the_whole_model(family: str, plain: Checkpoints) -> None:
    folder = four_bit(plain(family))
    expected = [mlx_reference(folder, prompt_tokens) for prompt_tokens in (23, 40)]
    assert_ragged_batch_equal(mlx_pipeline(folder, (2, 4)), expected, chunk=17)


def test_experts_packed_as_mxfp4_equal_the_whole_model(plain: Checkpoints) -> None:
    """As gpt-oss is published: four bits and a shared exponent, for the experts alone."""
    folder = four_bit(plain("gpt_oss"), "mxfp4", only="experts")
    expected = mlx_reference(folder)
    engines = mlx_pipeline(folder, (3,))
    assert_equal(*greedy(engines, expected.prompt, len(expected.ids), chunks=(17,)), expected)


def published(folder: Path) -> tuple[Path, Path]:
    """gpt-oss with its experts packed as OpenAI publishes them, and the same weights unpacked."""
    files: Any = mx.load(str(folder / "model.safetensors"))
    packed, unpacked = dict(files), dict(files)
    for name in [name for name in files if name.endswith(("gate_up_proj", "down_proj"))]:
        matrix, scales = mx.quantize(packed.pop(name).swapaxes(1, 2), group_size=32, bits=4, mode="mxfp4")
        packed[f"{name}_blocks"] = matrix.view(mx.uint8).reshape(*scales.shape, 16)
        packed[f"{name}_scales"] = scales
        whole = mx.dequantize(matrix, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
        unpacked[name] = whole.swapaxes(1, 2)
    targets = folder.with_name("packed"), folder.with_name("unpacked")
    for target, tensors in zip(targets, (packed, unpacked), strict=True):
        target.mkdir()
        config = json.loads((folder / "config.json").read_text())
        if tensors is packed:
            config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        mx.save_safetensors(str(target / "model.safetensors"), tensors, {"format": "pt"})
        (target / "config.json").write_text(json.dumps(config))
    return targets


def test_gpt_oss_as_published_equals_transformers_on_the_unpacked_weights(tmp_path: Path) -> None:
    packed, unpacked = published(make_checkpoint("gpt_oss", tmp_path / "gpt_oss"))
    expected = decisive_reference(
        WholeModel(unpacked), prompt_tokens=40, count=LAST_TOKENS, tolerance=TOLERANCE, seeds=range(16)
    )
    assert_like_transformers(mlx_pipeline(packed, (2, 4)), [expected])
