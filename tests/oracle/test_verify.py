"""`potluck verify` on real engines and references: right models pass, and what is wrong is found where it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference needs the extra [torch]")
pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import torch
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from safetensors.torch import load_file, save_file

from cluster.cli.verify import VerifyCommand, verify_command
from cluster.cli.verify_cut import even_cut
from cluster.errors import ModelError, UsageError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.types import Backend
from node.comparison import Trace
from node.engines.mlx.reference import in_words_of_mlx_lm
from node.engines.mlx.reference import trace_whole_model as trace_by_mlx
from node.engines.registry import create_engine
from node.engines.torch.reference import trace_whole_model as trace_by_torch
from node.hardware import detect_devices
from node.verdict import Part, Verdict
from node.verification import Subject, verify
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.oracle.reference import WholeModel, random_prompt

Checkpoints = Callable[[str], Path]

DEVICES = {backend: detect_devices(backend, "cpu")[0] for backend in Backend}
TOKENS = 40
TORCH, MLX = (Backend.TORCH,), (Backend.MLX,)
MIXED, MIXED_BACK = (Backend.TORCH, Backend.MLX), (Backend.MLX, Backend.TORCH)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trace_of(folder: Path, reference: Backend = Backend.TORCH) -> Trace:
    trace = trace_by_torch if reference is Backend.TORCH else trace_by_mlx
    return trace(folder, read_facts(open_checkpoint(folder)), tuple(random_prompt(TOKENS, 3)), DEVICES[reference])


@cache
def torch_trace(folder: Path) -> Trace:
    return trace_of(folder)


def verdict_of(folder: Path, backends: Sequence[Backend], trace: Trace, *, narrow: bool = False) -> Verdict:
    """Two stages of the model in `folder`; the trace may be another folder's."""
    facts = read_facts(open_checkpoint(folder))
    parts = [Part(i, cut, DEVICES[backends[i % len(backends)]]) for i, cut in enumerate(even_cut(facts, 2))]
    return verify(Subject(folder, facts, tuple(parts), narrow), trace, create_engine, lambda what, done, total: None)


def wrong_layers(verdict: Verdict) -> set[int]:
    return {layer.part.layers.first for layer in verdict.layers if not layer.within}


def with_config(folder: Path, target: Path, **fields: object) -> Path:
    """A copy whose configuration says something else."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


def with_tensor(folder: Path, target: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy with another value of one tensor."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: change(tensors[name]).contiguous()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("backends", [TORCH, MLX, MIXED], ids="-".join)
@pytest.mark.parametrize("family", [*FAMILIES, "gemma4_small", "llama4"])
def test_every_family_is_within_tolerance(family: str, backends: Sequence[Backend], checkpoint: Checkpoints) -> None:
    verdict = verdict_of(checkpoint(family), backends, torch_trace(checkpoint(family)))
    assert verdict.within
    assert verdict.chain.expected_tokens == verdict.chain.found_tokens
    assert verdict.worst_layer.error < verdict.worst_layer.tolerance / 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_16_bit_models_are_within_their_tolerance(family: str, dtype: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path / "model", dtype=dtype)
    assert verdict_of(folder, MIXED_BACK, trace_of(folder)).within


@pytest.mark.parametrize("family", [*FAMILIES, "gemma4_small"])
def test_the_trace_ends_in_the_whole_models_logits(family: str, checkpoint: Checkpoints) -> None:
    """Both references agree with the library called in another way, and with each other on every layer."""
    by_torch, by_mlx = torch_trace(checkpoint(family)), trace_of(checkpoint(family), Backend.MLX)
    expected = WholeModel(checkpoint(family)).logits(by_torch.tokens)[-8:]
    np.testing.assert_allclose(by_torch.logits, expected, rtol=0, atol=5e-4)
    np.testing.assert_allclose(by_mlx.logits, expected, rtol=0, atol=5e-4)
    assert len(by_torch.hidden) == len(by_mlx.hidden) == 1 + read_facts(open_checkpoint(checkpoint(family))).layer_count
    assert (by_torch.inputs is None) == (by_mlx.inputs is None) == (family != "gemma4_small")
    if by_torch.inputs is not None and by_mlx.inputs is not None:
        np.testing.assert_allclose(by_torch.inputs, by_mlx.inputs, rtol=0, atol=5e-4)
    for one, other in zip(by_torch.hidden, by_mlx.hidden, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-4)


def test_a_four_bit_checkpoint_is_compared_with_mlx_lm(checkpoint: Checkpoints, tmp_path: Path) -> None:
    stated = json.loads((checkpoint("qwen3") / "config.json").read_text())
    model, config = load_model(checkpoint("qwen3"), model_config=in_words_of_mlx_lm(stated))
    model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    assert verdict_of(tmp_path, MLX, trace_of(tmp_path, Backend.MLX)).within


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backends", [TORCH, MLX], ids="-".join)
def test_a_wrong_base_of_the_rotation_is_found_in_every_layer(
    backends: Sequence[Backend], dtype: str, tmp_path: Path
) -> None:
    folder = make_checkpoint("llama", tmp_path / "right", dtype=dtype)
    wrong = with_config(folder, tmp_path / "wrong", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    assert wrong_layers(verdict_of(wrong, backends, trace_of(folder))) == set(range(6))


def test_experts_in_16_bits_are_within_tolerance_and_still_show_a_wrong_rotation(tmp_path: Path) -> None:
    """On torch: MLX computes experts on a CPU in float32 alone."""
    folder = make_checkpoint("qwen3_moe", tmp_path / "right", dtype="bfloat16")
    trace = trace_of(folder)
    assert verdict_of(folder, TORCH, trace).within
    wrong = with_config(folder, tmp_path / "wrong", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    assert wrong_layers(verdict_of(wrong, TORCH, trace)) == set(range(6))


@pytest.mark.parametrize("backends", [TORCH, MLX], ids="-".join)
def test_a_wrong_base_of_the_layers_without_a_window_is_found_in_them_alone(
    backends: Sequence[Backend], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    rope = json.loads((checkpoint("gemma3") / "config.json").read_text())["rope_parameters"]
    rope["full_attention"]["rope_theta"] = 1e6
    wrong = with_config(checkpoint("gemma3"), tmp_path / "wrong", rope_parameters=rope)
    assert wrong_layers(verdict_of(wrong, backends, torch_trace(checkpoint("gemma3")))) == {2, 5}


@pytest.mark.parametrize("backends", [TORCH, MLX], ids="-".join)
def test_a_window_one_too_wide_is_found_in_the_layers_that_have_one(
    backends: Sequence[Backend], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    wrong = with_config(checkpoint("gemma3"), tmp_path / "wrong", sliding_window=17)
    assert wrong_layers(verdict_of(wrong, backends, torch_trace(checkpoint("gemma3")))) == {0, 1, 3, 4}


@pytest.mark.parametrize("wrong", [0, 3, 5])
def test_a_layer_with_other_weights_is_found_alone(wrong: int, checkpoint: Checkpoints, tmp_path: Path) -> None:
    name = f"model.layers.{wrong}.self_attn.o_proj.weight"
    folder = with_tensor(checkpoint("qwen3_moe"), tmp_path / "wrong", name, lambda weight: weight * 1.01)
    verdict = verdict_of(folder, MIXED, torch_trace(checkpoint("qwen3_moe")))
    assert wrong_layers(verdict) == {wrong}
    assert verdict.worst_layer.part.layers.first == wrong
    assert [stage.within for stage in verdict.stages] == [wrong >= 3, wrong < 3]
    assert not verdict.chain.within


@pytest.mark.parametrize("backends", [TORCH, MLX], ids="-".join)
def test_a_wrong_input_of_a_later_layer_is_found_where_it_is_made(
    backends: Sequence[Backend], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Layer 0 makes the inputs of all layers; what it computes with its own is right."""
    folder, name = checkpoint("gemma4_small"), "model.per_layer_model_projection.weight"

    def wrong_for_the_last(weight: torch.Tensor) -> torch.Tensor:
        by_layer = weight.unflatten(0, (6, -1)).clone()
        by_layer[5] *= -1
        return by_layer.flatten(0, 1)

    wrong = with_tensor(folder, tmp_path / "wrong", name, wrong_for_the_last)
    verdict = verdict_of(wrong, backends, torch_trace(folder))
    assert wrong_layers(verdict) == {0}
    assert [stage.within for stage in verdict.stages] == [False, True]


def test_a_reference_with_random_weights_is_none(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """transformers fills what no file holds with random numbers, and says so only in its report."""
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    facts = read_facts(open_checkpoint(tmp_path / "model"))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"transformers found no model\.layers\.2\.mlp\.up_proj\.weight"):
        trace_by_torch(tmp_path / "model", facts, (1, 2, 3), DEVICES[Backend.TORCH])


def test_the_text_model_of_a_vision_language_checkpoint_is_verified(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """As transformers itself writes and reads one, vision tower and all."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text_config = json.loads((checkpoint("gemma3") / "config.json").read_text())
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={name: value for name, value in text_config.items() if name != "architectures"},
        vision_config=small | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=3,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    for reference in Backend:
        assert verdict_of(tmp_path, MIXED, trace_of(tmp_path, reference)).within


def test_the_command_says_what_it_compared_and_ends_with_0(tmp_path: Path) -> None:
    arguments = ["verify", "demo", "--stages", "torch:0-5,mlx:6-11", "--json", "--state", str(tmp_path)]
    command = [sys.executable, "-m", "cluster.cli.main", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["ok"]
    assert "transformers" in found["reference"]["library"]
    assert [(stage["backend"], stage["first_layer"], stage["last_layer"]) for stage in found["stages"]] == [
        ("torch", 0, 6),
        ("mlx", 6, 12),
    ]
    assert [layer["first_layer"] for layer in found["layers"]] == list(range(12))
    assert "layers 6-11 on mlx" in result.stderr


def test_the_command_names_the_wrong_layer_and_ends_with_1(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference is of other files than the stages."""
    wrong = with_tensor(
        checkpoint("llama"), tmp_path / "wrong", "model.layers.4.mlp.up_proj.weight", lambda weight: weight * 1.01
    )
    trace = torch_trace(checkpoint("llama"))
    monkeypatch.setattr("cluster.cli.verify._trace", lambda *_: trace)
    monkeypatch.setattr("cluster.cli.verify._input", lambda *_: trace.tokens)
    assert verify_command(VerifyCommand(str(wrong), "3", "torch,mlx", TOKENS, state=tmp_path / "state")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(
        "NOT within tolerance: stage 2; the chain; layer 4. The worst layer is layer 4 of stage 2"
    )
    assert [line.split()[1] for line in lines if line.startswith("layer ") and line.endswith("WRONG")] == ["4"]


@pytest.mark.parametrize("backends", [TORCH, MLX, MIXED, MIXED_BACK])
def test_prompts_in_eight_bits_are_shown_beside_the_exact_chain(
    backends: tuple[Backend, ...], checkpoint: Checkpoints
) -> None:
    verdict = verdict_of(checkpoint("llama"), backends, torch_trace(checkpoint("llama")), narrow=True)
    assert verdict.within and verdict.narrow is not None
    assert 10 * verdict.chain.error < verdict.narrow.error < 0.1
    assert verdict.narrow.expected_tokens == verdict.chain.expected_tokens


def test_a_backend_that_cannot_run_the_model_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    packed = with_config(
        checkpoint("llama"), tmp_path / "packed", quantization={"group_size": 16, "bits": 4, "mode": "nvfp4"}
    )
    with pytest.raises(UsageError, match="runs on mlx alone, not on torch"):
        verify_command(VerifyCommand(str(packed), "2", "torch", TOKENS, state=tmp_path / "state"))
