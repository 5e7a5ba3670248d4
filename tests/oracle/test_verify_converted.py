"""`potluck verify` on checkpoints that mlx-lm wrote, judged by transformers: the reference unpacks them by definition
and puts them in transformers' words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="the reference needs the extra [torch]")
pytest.importorskip("mlx_lm", reason="the checkpoints are made by mlx-lm")

from cluster.cli import verify
from cluster.cli.verify import VerifyCommand, verify_command, whole_bytes
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.nodes import MemoryReport, Pressure
from cluster.types import Backend
from node.engines.torch.packed import Affine
from node.hardware import read_machine
from tests.checkpoints import make_checkpoint
from tests.converted import convert, unconverted
from tests.oracle.test_verify import MIXED, TORCH, trace_of, verdict_of
from tests.wrappers import WRAPPED, wrap

UNDONE = ("gpt_oss", "deepseek_v3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe", "lfm2", "gemma4", "llama4")
"""mlx-lm renames, splits, turns or raises something of each."""

KEPT = ("llama", "gemma4_small", "phi3")
"""It only packs these: separate and fused matrices, tables of layers' own inputs."""

Made = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A converted checkpoint, and the same numbers as transformers stores them."""

    @cache
    def make(family: str, bits: int | None = 4, mode: str = "affine") -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(family)
        packed = convert(make_checkpoint(family, folder / "plain"), folder / "packed", bits=bits, mode=mode)
        return packed, unconverted(packed, folder / "unpacked")

    return make


def assert_same_trace(found: Path, expected: Path) -> None:
    one, other = trace_of(found), trace_of(expected)
    assert np.array_equal(one.logits, other.logits)
    assert all(map(np.array_equal, one.hidden, other.hidden))


@pytest.mark.parametrize("family", UNDONE + KEPT)
def test_the_reference_computes_with_the_numbers_that_are_packed(family: str, made: Made) -> None:
    assert_same_trace(*made(family))


@pytest.mark.parametrize("family", UNDONE)
def test_a_checkpoint_converted_in_full_precision_has_a_reference_as_well(family: str, made: Made) -> None:
    assert_same_trace(*made(family, None))


@pytest.mark.parametrize(("bits", "mode"), [(3, "affine"), (6, "affine"), (8, "affine"), (4, "mxfp4")])
def test_the_reference_unpacks_every_width(bits: int, mode: str, made: Made) -> None:
    assert_same_trace(*made("qwen3_moe", bits, mode))


@pytest.mark.parametrize("wrapper", ["gemma3", "qwen3_5_moe", "llama4"])
def test_a_text_model_within_another_has_a_reference(wrapper: str, made: Made, tmp_path: Path) -> None:
    """As mlx-lm names the tensors of a vision-language checkpoint's text model."""
    packed, unpacked = made(WRAPPED[wrapper])
    plain = make_checkpoint(WRAPPED[wrapper], tmp_path / "plain")
    config = json.loads((wrap(wrapper, plain, tmp_path / "wrapped") / "config.json").read_text())
    stated = json.loads((packed / "config.json").read_text())["quantization"]
    tensors = load_file(packed / "model.safetensors")
    target = tmp_path / "packed"
    target.mkdir()
    below = {f"language_model.{name.removeprefix('language_model.')}": array for name, array in tensors.items()}
    save_file(below, target / "model.safetensors", {"format": "mlx"})
    (target / "config.json").write_text(json.dumps(config | {"quantization": stated}))
    found, expected = trace_of(target), trace_of(unpacked)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_stages_of_both_engines_are_within_tolerance(family: str, made: Made) -> None:
    packed, _ = made(family)
    assert verdict_of(packed, MIXED, trace_of(packed)).within


def test_scales_of_a_neighbour_are_found(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = made("qwen3_moe")
    trace = trace_of(packed)
    values = Affine.values
    monkeypatch.setattr(Affine, "values", lambda matrix: values(replace(matrix, scales=matrix.scales.roll(1, -1))))
    assert not verdict_of(packed, TORCH, trace).within


def library_of(folder: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()  # mlx-lm says something where the checkpoint was made just now
    command = VerifyCommand(model=str(folder), backend="torch", state=state, as_json=True, tokens=24)
    assert verify_command(command) == 0
    return str(json.loads(capsys.readouterr().out)["reference"]["library"])


def test_a_machine_without_mlx_verifies_what_mlx_packed(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(read_machine(), engines=frozenset({Backend.TORCH}))
    monkeypatch.setattr(verify, "read_machine", lambda: machine)
    monkeypatch.setattr("node.hardware.read_machine", lambda: machine)
    assert "transformers" in library_of(made("qwen3_moe")[0], tmp_path, capsys)


def test_transformers_judges_where_it_has_room_and_mlx_where_not(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm has no window in Gemma 2 and other positions in gpt-oss, so transformers is asked first."""
    packed, unpacked = map(open_checkpoint, made("llama"))
    facts = read_facts(packed)
    needed = whole_bytes(packed, facts, Backend.TORCH)
    assert needed == 2 * read_facts(unpacked).stored_bytes
    for room, judge in ((needed, Backend.TORCH), (needed - 1, Backend.MLX)):
        report = MemoryReport(room, room, 0, room, Pressure.NORMAL, "as this test says")
        monkeypatch.setattr(verify, "measure_memory", lambda device, report=report: report)
        assert verify._reference(packed, facts).backend is judge
