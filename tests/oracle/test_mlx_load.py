"""Loading a slice on MLX: only what is owned, all that is owned, in little more memory than it takes."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from cluster.errors import ModelError, UsageError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.types import DType, LayerRange
from node.engine import LoadProgress
from node.engines.mlx import slicing
from node.engines.mlx.engine import MlxEngine
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.oracle.mlx_reference import mlx_reference, whole_mlx_model
from tests.oracle.pipelines import greedy, load_pipeline, run_prefill, stage_specs
from tests.oracle.reference import random_prompt
from tests.oracle.test_mlx_engine import CUTS, assert_equal, assert_ragged_batch_equal, mlx_pipeline

Checkpoints = Callable[[str], Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_that_a_stage_does_not_own_are_never_computed_with(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """A node's files are sparse. Here everything that a stage does not own is NaN, which would reach any sum."""
    expected = mlx_reference(checkpoint(family))
    engines = []
    for spec in stage_specs(checkpoint(family), (2, 4)):
        folder = shutil.copytree(checkpoint(family), tmp_path / str(spec.layers))
        stored = open_checkpoint(folder)
        owned = {tensor.name for tensor in owned_tensors(stored, spec.layers, spec.layer_count)}
        with (folder / "model.safetensors").open("r+b") as file:
            for tensor in stored.tensors.values():
                if tensor.name not in owned:
                    file.seek(tensor.begin)
                    file.write(b"\xff" * tensor.size_bytes)
        engines += load_pipeline([MlxEngine], [replace(spec, folder=folder)])
    assert_equal(*greedy(engines, expected.prompt, 5), expected)


def test_several_files_load_like_one(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3", tmp_path, shards=4)
    assert len(list(folder.glob("*.safetensors"))) > 2
    expected = mlx_reference(checkpoint("qwen3"))
    assert_equal(*greedy(mlx_pipeline(folder, (3,)), expected.prompt, 5), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_progress_rises_to_the_bytes_of_the_slice(family: str, checkpoint: Checkpoints) -> None:
    for spec in stage_specs(checkpoint(family), (2, 4)):
        seen: list[LoadProgress] = []
        MlxEngine().load(spec, seen.append)
        owned = owned_tensors(open_checkpoint(spec.folder), spec.layers, spec.layer_count)
        total = sum(tensor.size_bytes for tensor in owned)
        assert {report.total_bytes for report in seen} == {total}
        assert [report.done_bytes for report in seen] == sorted(report.done_bytes for report in seen)
        assert (seen[0].done_bytes, seen[-1].done_bytes) == (0, total)


def test_the_text_model_of_a_vision_language_checkpoint_is_read_through_its_wrapper(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Gemma 3 with vision wraps the text model's configuration and names."""
    config = json.loads((checkpoint("gemma3") / "config.json").read_text())
    weights = mx.load(str(checkpoint("gemma3") / "model.safetensors"))
    assert isinstance(weights, dict)
    wrapped = {f"language_model.{name}": array for name, array in weights.items()}
    wrapped["vision_tower.layers.0.weight"] = mx.full((8, 8), float("nan"))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), wrapped, {"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    expected = mlx_reference(checkpoint("gemma3"))
    assert_equal(*greedy(mlx_pipeline(tmp_path, (3,)), expected.prompt, 5), expected)


def quantised(folder: Path, target: Path) -> Path:
    """A 4-bit checkpoint as mlx-lm writes it: some of its layers have other bits, some are left alone."""

    def how(path: str, module: object) -> bool | dict[str, int]:
        if "layers.1." in path:
            return {"group_size": 64, "bits": 8} if module.weight.shape[-1] % 64 == 0 else True  # type: ignore[attr-defined]
        return "layers.2.self_attn" not in path

    model, config = load_model(folder, model_config=whole_mlx_model(folder).stated)
    model, config = quantize_model(model, config, group_size=32, bits=4, quant_predicate=how)
    target.mkdir(parents=True)
    save_model(target, model)
    save_config(config, target / "config.json")
    return target


@pytest.fixture(scope="module")
def four_bit(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = quantised(checkpoint(family), tmp_path_factory.mktemp("four_bit") / family)
        return made[family]

    return make


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_four_bit_checkpoints_equal_the_whole_model(family: str, cuts: Sequence[int], four_bit: Checkpoints) -> None:
    expected = mlx_reference(four_bit(family))
    engines = mlx_pipeline(four_bit(family), cuts)
    assert_equal(*greedy(engines, expected.prompt, len(expected.ids), chunks=(17,)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bit_checkpoints_are_exact_in_ragged_batches(family: str, four_bit: Checkpoints) -> None:
    expected = [mlx_reference(four_bit(family), prompt_tokens) for prompt_tokens in (5, 23)]
    assert_ragged_batch_equal(mlx_pipeline(four_bit(family), (3,)), expected, chunk=9)


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint whose tensors `change` has edited."""
    shutil.copytree(source, target)
    weights: Any = mx.load(str(source / "model.safetensors"))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    return target


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.layers.1.input_layernorm.weight"), "input_layernorm"),
        (lambda weights: weights.update({UP: weights[UP][:, :32]}), r"up_proj.*shape"),
        (lambda weights: weights.update({UP: weights[UP].astype(mx.uint32)}), r"up_proj.*uint32"),
        (lambda weights: weights.update({UP: weights[UP].astype(mx.int8)}), r"up_proj.*I8"),
        (lambda weights: weights.update({UP: weights[UP].astype(mx.bfloat16)}), None),
        (lambda weights: weights.update({UP.replace("up_proj", "magic"): weights[UP]}), "no use for"),
        (lambda weights: weights.update({"model.layers.1.self_attn.q_proj.bias": mx.zeros(64)}), "no use for"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(
    change: Callable[[dict[str, Any]], None], message: str | None, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = rewritten(checkpoint("llama"), tmp_path / "changed", change)
    if message is None:  # a narrower type than the rest is exact: MLX widens it
        mlx_pipeline(folder, (3,))
        return
    with pytest.raises(ModelError, match=message):
        mlx_pipeline(folder, (3,))


def test_a_truncated_file_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "cut")
    specs = stage_specs(folder, ())
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(200_000)
    with pytest.raises(ModelError):
        load_pipeline([MlxEngine], specs)


def test_state_that_is_no_attention_is_refused(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent layer packed like an attention layer would be wrong without a warning."""
    build = slicing.build_model

    def recurrent(arguments: Any) -> Any:
        model = build(arguments)
        monkeypatch.setattr(type(model), "make_cache", lambda self: [ArraysCache(2) for _ in self.layers])
        return model

    monkeypatch.setattr("node.engines.mlx.weights.build_model", recurrent)
    with pytest.raises(ModelError, match="layer 0 keeps its state in a ArraysCache"):
        mlx_pipeline(checkpoint("llama"))


def test_a_plan_for_another_model_is_refused(checkpoint: Checkpoints) -> None:
    (spec,) = stage_specs(checkpoint("llama"), ())
    hidden = spec.boundary[0]
    for other in (
        replace(spec, layer_count=7),
        replace(spec, boundary=(replace(hidden, shape=(65,)),)),
        replace(spec, boundary=(replace(hidden, dtype=DType.I32),)),
        replace(spec, layers=LayerRange(0, 3), boundary=(replace(hidden, dtype=DType.BF16),)),
    ):
        with pytest.raises(ModelError, match=r"the plan|passes on"):
            load_pipeline([MlxEngine], [other])


@pytest.mark.parametrize("device", ["cuda:0", "metal", "gpu", ""])
def test_a_device_that_is_not_there_is_refused(device: str, checkpoint: Checkpoints) -> None:
    if device == "metal" and mx.metal.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(UsageError, match="device"):
        load_pipeline([MlxEngine], stage_specs(checkpoint("llama"), (), device=device))


PEAK_SCRIPT = """
import sys
from pathlib import Path
import mlx.core as mx, mlx_lm.models.llama, mlx_lm.models.qwen3_moe
from tests.oracle.memory_peaks import forget_peak, resident_bytes
from tests.oracle.pipelines import stage_specs
from node.engines.mlx.engine import MlxEngine

specs = stage_specs(Path(sys.argv[1]), (1, 5))
forget_peak()
before, files = resident_bytes("VmRSS"), resident_bytes("RssFile")
engine = MlxEngine()
engine.load(specs[1], lambda progress: None)
growth = resident_bytes("VmHWM") - before - (resident_bytes("RssFile") - files)  # code pages come and go
print(engine.capacity().weight_bytes, mx.get_peak_memory(), growth)
"""

PEAK_CONSTANT_BYTES = 8 << 20
"""Thread stacks, the graph: what does not grow with the model."""

ROWS_BYTES = 5 << 20
"""Some rows of an expert on their way into its stack, and marks of which goes where; a stack has 16 MiB."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"hidden_size": 768, "intermediate_size": 2048, "head_dim": 64, "num_attention_heads": 12}),
        ("qwen3_moe", {"hidden_size": 512, "moe_intermediate_size": 1024}),
    ],
)
def test_a_load_needs_the_slice_and_little_more(family: str, sizes: dict[str, int], tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, layers=6, **sizes)
    done = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    slice_bytes, mlx_peak, resident_peak = map(int, done.stdout.split())
    assert slice_bytes > 80 << 20
    assert mlx_peak <= slice_bytes + ROWS_BYTES
    assert resident_peak <= slice_bytes + ROWS_BYTES + PEAK_CONSTANT_BYTES


def test_close_frees_weights_and_cache(checkpoint: Checkpoints) -> None:
    gc.collect()  # what earlier tests left behind must not be freed meanwhile
    before = mx.get_active_memory()
    (engine,) = engines = mlx_pipeline(checkpoint("llama"))
    run_prefill(engines, random_prompt(30, seed=0))
    assert mx.get_active_memory() > before + engine.capacity().weight_bytes
    engine.close()
    del engine, engines
    assert mx.get_active_memory() - before < 64 << 10
