"""`potluck verify` run again, on real engines: the same to the bit, or it says which layers have moved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the reference needs the extra [torch]")
pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx
import torch

from cluster.cli import drift
from cluster.cli.verify import VerifyCommand, verify_command
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.types import Backend
from node.comparison import Trace
from node.engines.mlx.positions import LayerCache
from node.engines.torch.reference import trace_whole_model
from node.hardware import detect_devices
from tests.oracle.reference import random_prompt

Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(folder: Path, state: Path, capsys: pytest.CaptureFixture[str], **options: bool) -> tuple[int, dict[str, Any]]:
    code = verify_command(VerifyCommand(str(folder), "2", "torch,mlx", 16, state=state, as_json=True, **options))
    return code, json.loads(capsys.readouterr().out)


def test_a_second_run_makes_the_same_fingerprints(
    checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = _run(checkpoint("gemma3"), tmp_path, capsys)
    code, second = _run(checkpoint("gemma3"), tmp_path, capsys)
    assert code == 0
    assert [layer["moved"] for made in first["fingerprints"] for layer in made["layers"]] == [None] * 6
    assert [layer["identical"] for made in second["fingerprints"] for layer in made["layers"]] == [True] * 6
    assert [made["backend"] for made in second["fingerprints"]] == ["torch", "mlx"]
    assert "transformers" in second["fingerprints"][0]["layers"][0]["since"]


def test_an_engine_that_computes_a_little_otherwise_after_an_update_has_drifted_and_is_still_right(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred-thousandth more attention: within the reference's tolerance on MLX, and no rounding."""
    _run(checkpoint("llama"), tmp_path, capsys)
    fetch = LayerCache.update_and_fetch

    def more(self: LayerCache, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return fetch(self, keys, values * 1.00004)

    monkeypatch.setattr(LayerCache, "update_and_fetch", more)
    version = drift.engine_version
    monkeypatch.setattr(drift, "engine_version", lambda backend: version(backend).replace("mlx ", "mlx 9"))
    code, found = _run(checkpoint("llama"), tmp_path, capsys)
    by_torch, by_mlx = found["fingerprints"]
    assert (code, found["ok"], found["drifted"]) == (3, True, True)
    assert all(layer["identical"] for layer in by_torch["layers"])
    assert [layer["ok"] for layer in by_mlx["layers"]] == [False] * 3
    assert all(layer["since"] != by_mlx["versions"] for layer in by_mlx["layers"])
    code, found = _run(checkpoint("llama"), tmp_path, capsys, accept=True)
    assert (code, found["fingerprints_kept"]) == (0, True)
    assert _run(checkpoint("llama"), tmp_path, capsys)[0] == 0


def test_what_is_wrong_is_never_kept_to_compare_with(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cluster.cli.verify._input", lambda *_: tuple(random_prompt(16, 3)))
        patch.setattr("cluster.cli.verify._trace", lambda *_: _of_other_files(checkpoint("llama")))
        code, found = _run(checkpoint("llama"), tmp_path, capsys, accept=True)
    assert (code, found["fingerprints_kept"]) == (1, False)
    _, found = _run(checkpoint("llama"), tmp_path, capsys)
    assert found["fingerprints"][0]["layers"][0]["since"] is None


def _of_other_files(folder: Path) -> Trace:
    """Twice as large as it should be in one place."""
    facts, cpu = read_facts(open_checkpoint(folder)), detect_devices(Backend.TORCH, "cpu")[0]
    trace = trace_whole_model(folder, facts, tuple(random_prompt(16, 3)), cpu)
    return replace(trace, logits=2 * trace.logits)
