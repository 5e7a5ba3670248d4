"""`potluck verify` on checkpoints as their publishers write them: eight-bit floats, and gpt-oss' blocks of four bits.
transformers is the reference, of numbers that are unpacked by their definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference needs the extra [torch]")
pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.cli.verify import VerifyCommand, verify_command, whole_bytes
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.types import Backend
from node.engines.torch.packed import Fp8
from tests.checkpoints import make_checkpoint
from tests.eight_bit_checkpoints import LAYOUTS, eight_bits
from tests.oracle.test_mlx_packed import published
from tests.oracle.test_verify import MIXED, TORCH, trace_of, verdict_of

CASES = [
    *(("llama", kind) for kind in LAYOUTS),
    ("qwen3_moe", "blocks"),
    ("deepseek_v3", "blocks"),
    ("gpt_oss", "mxfp4"),
]

Made = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def make(family: str, kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(family)
        plain = make_checkpoint(family, folder / family)
        return published(plain) if kind == "mxfp4" else eight_bits(plain, kind)

    return make


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_reference_computes_with_the_numbers_that_are_packed(family: str, kind: str, made: Made) -> None:
    packed, unpacked = map(trace_of, made(family, kind))
    assert np.array_equal(packed.logits, unpacked.logits)
    assert all(map(np.array_equal, packed.hidden, unpacked.hidden))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_stages_of_both_engines_are_within_tolerance(family: str, kind: str, made: Made) -> None:
    packed, _ = made(family, kind)
    assert verdict_of(packed, MIXED, trace_of(packed)).within


def test_scales_of_a_neighbour_are_found(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = made("llama", "blocks")
    trace = trace_of(packed)
    values = Fp8.values
    monkeypatch.setattr(Fp8, "values", lambda matrix: values(replace(matrix, scales=matrix.scales.roll(1, -1))))
    assert not verdict_of(packed, TORCH, trace).within


def test_gpt_oss_is_judged_by_transformers(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mlx-lm computes other positions than the model's own where yarn is not truncated, as in gpt-oss."""
    folder, _ = made("gpt_oss", "mxfp4")
    assert verify_command(VerifyCommand(model=str(folder), state=tmp_path, as_json=True, tokens=24)) == 0
    assert "transformers" in json.loads(capsys.readouterr().out)["reference"]["library"]


def test_the_reference_needs_room_to_unpack(made: Made) -> None:
    """Numbers, and the model that is made of them."""
    packed, unpacked = (open_checkpoint(folder) for folder in made("llama", "blocks"))
    assert whole_bytes(packed, read_facts(packed), Backend.TORCH) == 2 * read_facts(unpacked).stored_bytes
