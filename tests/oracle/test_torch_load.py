"""Loading a slice into the torch engine: every owned byte from its file, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.types import DType, TensorSpec
from node.engine import LoadProgress, StageSpec
from node.engines.torch.engine import TorchEngine
from node.engines.torch.ordered import Ordered, OrderedStack
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import load_pipeline, run_prefill, stage_specs
from tests.oracle.reference import WholeModel, random_prompt

Checkpoints = Callable[[str], Path]
WholeModels = Callable[[str], WholeModel]


def load(spec: StageSpec) -> TorchEngine:
    engine = TorchEngine()
    engine.load(spec, lambda progress: None)
    return engine


def parameters(engine: TorchEngine) -> dict[str, torch.Tensor]:
    assert engine._stage is not None
    sliced = engine._stage.sliced
    found = {sliced.whole_name(name): value for name, value in sliced.model.named_parameters()}
    for path, module in sliced.model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Ordered | OrderedStack):
                found[sliced.whole_name(f"{path}.{name}")] = value.plain()
    return found


def copied(folder: Path, to: Path, **config: object) -> Path:
    """A copy of a checkpoint with some configuration fields changed."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    fields = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))
    return to


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_of_each_stage_is_the_files_and_no_other_exists(
    family: str, shards: int, tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path, shards=shards)
    whole = WholeModel(folder).parameters()
    seen: set[str] = set()
    for spec in stage_specs(folder, (2, 4)):
        engine = load(spec)
        found = parameters(engine)
        owned = {tensor.name for tensor in owned_tensors(open_checkpoint(folder), spec.layers, spec.layer_count)}
        for name, value in found.items():
            tied_head = name == "lm_head.weight" and name not in whole
            assert torch.equal(value, whole["model.embed_tokens.weight" if tied_head else name]), name
        assert engine.capacity().weight_bytes == sum(value.nbytes for value in found.values())
        assert engine.capacity().weight_bytes == sum(
            tensor.size_bytes for name, tensor in open_checkpoint(folder).tensors.items() if name in owned
        )
        seen |= set(found)
    assert seen >= set(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_owned_bytes_are_read(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Each stage has its own sparse folder, in which everything that it does not own reads as zeros."""
    engines = []
    for index, spec in enumerate(stage_specs(checkpoint(family), (2, 4))):
        folder = copied(checkpoint(family), tmp_path / str(index))
        content = bytearray((folder / "model.safetensors").read_bytes())
        stored = open_checkpoint(folder)
        owned = {tensor.name for tensor in owned_tensors(stored, spec.layers, spec.layer_count)}
        for tensor in stored.tensors.values():
            if tensor.name not in owned:
                content[tensor.begin : tensor.end] = bytes(tensor.size_bytes)
        (folder / "model.safetensors").write_bytes(content)
        engines.append(load(stage_specs(folder, (2, 4))[index]))
    prompt = random_prompt(20, seed=1)
    expected = WholeModel(checkpoint(family)).logits(prompt)[-1]
    np.testing.assert_allclose(run_prefill(engines, prompt), expected, rtol=0, atol=TOLERANCE)


def test_progress_rises_to_the_slices_bytes(checkpoint: Checkpoints) -> None:
    reports: list[LoadProgress] = []
    engine = TorchEngine()
    engine.load(stage_specs(checkpoint("qwen3_moe"), (3,))[0], reports.append)
    done = [report.done_bytes for report in reports]
    assert done == sorted(done)
    assert done[0] == 0
    assert {report.total_bytes for report in reports} == {done[-1]} == {engine.capacity().weight_bytes}


def test_older_spellings_of_a_configuration_mean_the_same(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Checkpoints from before transformers 5 give the rotation's base and the number of experts elsewhere."""
    folder = copied(
        checkpoint("qwen3_moe"),
        tmp_path,
        rope_parameters=...,
        rope_theta=50_000.0,
        num_local_experts=...,
        num_experts=8,
    )
    prompt = random_prompt(20, seed=1)
    expected = WholeModel(checkpoint("qwen3_moe")).logits(prompt)[-1]
    found = run_prefill([load(stage_specs(folder, ())[0])], prompt)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "qwen3_5", "qwen3_5_moe"])
def test_the_text_model_of_a_vision_language_checkpoint_is_run(
    family: str, prefix: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Training leaves layers of its own in some, which predict a token further."""
    folder = copied(checkpoint(family), tmp_path)
    text_config = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["SomeForConditionalGeneration"], "model_type": family, "text_config": text_config}
    (folder / "config.json").write_text(json.dumps(outer))

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name if name == "lm_head.weight" else prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["mtp.layers.0.mlp.gate_proj.weight"] = torch.zeros(4, 4)
        tensors["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = torch.zeros(4, 4)

    change_tensors(folder, wrap)
    prompt = random_prompt(30, seed=1)
    expected = WholeModel(checkpoint(family)).logits(prompt)[-1]
    engines = load_pipeline([TorchEngine] * 2, stage_specs(folder, (3,)))
    np.testing.assert_allclose(run_prefill(engines, prompt), expected, rtol=0, atol=TOLERANCE)


def test_weights_stored_in_another_type_are_converted_through_a_small_buffer(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.engines.torch.weights._READ_BYTES", 1000)
    spec = stage_specs(checkpoint("qwen3_moe"), ())[0]
    exact = parameters(load(spec))
    narrow = replace(spec, boundary=(TensorSpec("hidden", (64,), DType.BF16),))
    found = parameters(load(narrow))
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact[name].bfloat16()), name


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("qwen3_moe", "float32")])
def test_a_load_needs_little_more_memory_than_its_slice(family: str, dtype: str, tmp_path: Path) -> None:
    """A slice of some 80 MB of a checkpoint of some 160 MB; growth of the peak at most the slice and a tenth, and in 16
    bits a matrix that is there twice while it is put in the order of the CPU's products."""
    folder = make_checkpoint(
        family,
        tmp_path / "large",
        layers=16,
        dtype=dtype,
        hidden_size=512 if dtype == "float32" else 768,
        intermediate_size=1536 if dtype == "float32" else 2048,
        moe_intermediate_size=192,
        shards=2,
    )
    warm = make_checkpoint(family, tmp_path / "warm", dtype=dtype)
    output = subprocess.run(
        [sys.executable, "-m", "tests.oracle.peak_memory", str(folder), str(warm)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    ).stdout
    growth_bytes, slice_bytes = map(int, output.split())
    twice_bytes = max(tensor.size_bytes for tensor in open_checkpoint(folder).tensors.values())
    assert slice_bytes > 75e6
    assert 0.95 * slice_bytes <= growth_bytes <= 1.10 * slice_bytes + (twice_bytes if dtype == "bfloat16" else 0)
