"""What `potluck verify` takes as stages and engines, and what it refuses before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.cli.verify import check_memory
from cluster.cli.verify_cut import even_cut, parse_backends
from cluster.errors import DoesNotFit, UsageError
from cluster.types import Backend
from node.verification import Subject
from tests import clusters
from tests.unit.test_verification import CPU, FACTS, LAYERS, stages


def test_engines_are_named_once_or_for_each_stage() -> None:
    assert parse_backends("auto", 3) == ()
    assert parse_backends("mlx", 2) == (Backend.MLX, Backend.MLX)
    assert parse_backends("torch, mlx", 3) == (Backend.TORCH, Backend.MLX, Backend.TORCH)


@pytest.mark.parametrize("text", ["cuda", "", "torch,", "torch,jax", "torch,mlx,torch"])
def test_engines_that_do_not_exist_or_have_no_stage_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--backend"):
        parse_backends(text, 2)


@pytest.mark.parametrize("layers", [1, 5, 12, 80])
def test_an_even_cut_owns_every_layer_once_in_stages_alike(layers: int) -> None:
    facts = clusters.model([1] * layers)
    for count in range(1, layers + 1):
        cut = even_cut(facts, count)
        assert [layer for part in cut for layer in part] == list(range(layers))
        assert max(map(len, cut)) - min(map(len, cut)) <= 1
    with pytest.raises(UsageError, match=f"it has {layers} layers"):
        even_cut(facts, layers + 1)


def test_a_cut_is_made_only_where_the_model_can_be_cut() -> None:
    assert [str(part) for part in even_cut(replace(FACTS, legal_cuts=frozenset({0, 1, 4})), 2)] == ["0-0", "1-5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "cuda"), "expected --backend auto, or names from mlx, torch"),
        (("--stages", "13"), "it has 12 layers"),
        (("--tokens", "5000"), "beyond the model's context of 4096"),
        (("--stages", "torch:0-5,mlx:7-11"), "expected each of 0-11 once, in order"),
        (("--stages", "torch:0-5,jax:6-11"), "such as torch:0-5,mlx:6-11"),
        (("--stages", "torch:5-0"), "such as torch:0-5,mlx:6-11"),
        (("--stages", "torch:0-11", "--backend", "mlx"), "leave --backend out"),
        (("--url", "http://127.0.0.1:1", "--stages", "3"), "leave --stages, --backend and --bits out"),
    ],
)
def test_a_wrong_argument_is_exit_code_2_and_says_what_is_right(
    arguments: Sequence[str], message: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["verify", "demo", *arguments, "--state", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("budget_bytes", "message"),
    [(99, "the reference holds the whole model"), (500, "stage 0 holds layers 0-2 and needs")],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    budget_bytes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = clusters.node("here", budget_bytes).memory
    monkeypatch.setattr("cluster.cli.verify.measure_memory", lambda device: memory)
    subject = Subject(Path("nowhere"), clusters.model([50] * LAYERS), stages(3))
    with pytest.raises(DoesNotFit, match=message):
        check_memory(subject, subject.facts.stored_bytes, CPU, tokens=16)
