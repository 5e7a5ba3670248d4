"""`potluck plan` as a process: of a model on the hub it reads headers, not weights."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from cluster.cli.serve import potluck_command
from coordinator.builtin import demo_model_path
from tests.integration.hub_server import Repository, hub_server

_COMMIT = "3" * 40


def plan(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name}
    command = potluck_command("plan", *arguments, "--no-mdns", "--state", str(tmp_path / "state"))
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=kept | environment)


def test_a_hub_model_is_planned_from_its_headers(tmp_path: Path) -> None:
    weights = demo_model_path() / "model.safetensors"
    with hub_server() as hub:
        hub.repositories["org/demo"] = Repository(demo_model_path(), _COMMIT)
        result = plan(tmp_path, "org/demo", "--json", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
        assert result.returncode == 0, result.stderr
        assert hub.sent_bytes[weights.name] < weights.stat().st_size / 10
    document = json.loads(result.stdout)
    local = json.loads(plan(tmp_path, "demo", "--json").stdout)
    assert document["stages"][0]["weight_bytes"] == local["stages"][0]["weight_bytes"] > weights.stat().st_size * 0.9
    for stage in document["stages"]:
        taken = stage["weight_bytes"] + stage["kv_bytes"] + stage["workspace_bytes"]
        assert taken <= stage["budget_bytes"] <= stage["total_bytes"] - stage["reserve_bytes"] < stage["total_bytes"]
    assert (document["stages"][0]["first_layer"], document["stages"][-1]["last_layer"]) == (0, 12)


def test_a_model_that_is_not_on_the_hub_is_named(tmp_path: Path) -> None:
    with hub_server() as hub:
        result = plan(tmp_path, "org/nothing", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 1
    assert "org/nothing" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_a_model_it_lists_what_fits(tmp_path: Path) -> None:
    document = json.loads(plan(tmp_path, "--json").stdout)
    assert [node["name"] for node in document["nodes"]] == ["this machine"]
    fits = {(row["billions"], row["bits"]): row["fits"] for row in document["fits"]}
    assert len(fits) == len(document["fits"]) > 10
    assert not fits[405, 16]


@pytest.mark.parametrize(
    ("arguments", "says"), [(("demo", "--context", "0"), "context"), (("demo", "--users", "0"), "users")]
)
def test_a_wrong_argument_ends_with_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    result = plan(tmp_path, *arguments)
    assert result.returncode == 2
    assert says in result.stderr


def test_a_refusal_says_what_is_missing(tmp_path: Path) -> None:
    result = plan(tmp_path, "demo", "--min-nodes", "2")
    assert result.returncode == 1
    assert "2 nodes are needed" in result.stderr
