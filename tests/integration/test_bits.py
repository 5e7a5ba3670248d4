"""`potluck serve --bits 4`: nodes of both engines pack a full-precision model while they load it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the checkpoints are made with transformers: the extra [torch]")
pytest.importorskip("mlx_lm", reason="one of the nodes needs the extra [mlx]")

from tests.integration.answers import questions
from tests.integration.live import Coordinator, Pool
from tests.integration.test_plan_command import plan
from tests.oracle.dequantised import dequantised
from tests.oracle.reference import WholeModel

NAMES = ("torch-a", "mlx-a")


@pytest.fixture(scope="module")
def packing(pool: Pool, checkpoint: Callable[[str], Path]) -> Iterator[Coordinator]:
    with pool.serving(checkpoint("qwen3"), NAMES, "--bits", "4") as made:
        yield made


def test_each_answer_is_that_of_the_rounded_numbers_in_one_process(
    packing: Coordinator, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = questions(WholeModel(dequantised(checkpoint("qwen3"), tmp_path / "rounded", 4)))
    as_stored = questions(WholeModel(checkpoint("qwen3")))
    assert [item.ids for item in expected] != [item.ids for item in as_stored]
    for item in expected:
        found = packing.complete(item.prompt, **item.fields())
        assert tuple(found["token_ids"]) == item.ids, item.sampling


def test_status_says_how_the_weights_are_held_and_nodes_hold_no_more(
    packing: Coordinator, checkpoint: Callable[[str], Path]
) -> None:
    status = packing.status()
    assert (status["model"]["format"], status["model"]["bits"]) == ("4-bit affine, group 64, made at load", 4)
    stages = status["plan"]["stages"]
    assert sorted(stage["node"] for stage in stages) == sorted(NAMES)
    stored = sum(file.stat().st_size for file in checkpoint("qwen3").glob("*.safetensors"))
    assert sum(stage["weight_bytes"] for stage in stages) < stored / 4


def test_plan_shows_what_packing_at_load_would_take(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = str(checkpoint("qwen3"))
    as_stored = json.loads(plan(tmp_path, folder, "--json").stdout)["stages"][0]
    packed = json.loads(plan(tmp_path, folder, "--bits", "8", "--json").stdout)
    assert packed["format"] == "8-bit affine, group 64, made at load"
    assert packed["stages"][0]["weight_bytes"] < 0.4 * as_stored["weight_bytes"]


def test_other_bits_are_a_usage_error(tmp_path: Path) -> None:
    result = plan(tmp_path, "demo", "--bits", "5")
    assert result.returncode == 2
    assert "expected --bits 4, 6 or 8, found 5" in result.stderr
