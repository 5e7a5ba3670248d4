"""`potluck models` as a process: what is on disk is listed, checked, traced to its source and removed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.serve import potluck_command
from cluster.state_dir import StateDir
from cluster.transport import Credentials
from cluster.types import LayerRange
from node.weights.fetch import SliceRequest, ensure_slice
from node.weights.shelf import Shelf
from tests.integration.hub_server import Repository, hub_server
from tests.integration.weight_roles import LAYERS, serving
from tests.stored_weights import SourceModel

_TENSOR_BYTES = 16 * 1024
_COMMIT = "4" * 40


def _models(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name}
    command = potluck_command("models", *arguments, "--state", str(root))
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=kept | environment)


def _said(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert "Traceback" not in result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    return SourceModel(tmp_path / "source", 0, _TENSOR_BYTES, name="org/tiny")


def test_every_store_below_the_state_is_listed(tmp_path: Path, source: SourceModel) -> None:
    source.put(Shelf(tmp_path / "state" / "local-node"), source.manifest.tensors[:5], used_s=1_700_000_000).close()
    source.put(Shelf(tmp_path / "state" / "node" / "1")).close()
    listed = _said(_models(tmp_path / "state", "list", "--json"))["models"]
    assert [(m["name"], m["id"], m["complete_tensors"], m["tensors"]) for m in listed] == [
        ("org/tiny", source.manifest.id, 5, 15),
        ("org/tiny", source.manifest.id, 15, 15),
    ]
    assert listed[0]["last_used"] == "2023-11-14T22:13:20+00:00"
    assert 5 * _TENSOR_BYTES <= listed[0]["bytes"] < listed[1]["bytes"]
    assert "org/tiny" in _models(tmp_path / "state", "list").stdout


def test_a_model_that_is_used_in_place_is_listed_with_its_folder(tmp_path: Path, source: SourceModel) -> None:
    asyncio.run(_use_in_place(source, tmp_path / "state" / "node"))
    [listed] = _said(_models(tmp_path / "state", "list", "--json"))["models"]
    assert (listed["name"], listed["in_place"]) == ("org/tiny", str(source.folder))
    assert listed["last_used"] != "never"
    assert f"used in place from {source.folder}" in _models(tmp_path / "state", "list").stdout
    source.put(Shelf(tmp_path / "state" / "node")).close()  # later its files came over the network
    [listed] = _said(_models(tmp_path / "state", "list", "--json"))["models"]
    assert (listed["in_place"], listed["complete_tensors"]) == (None, 15)


async def _use_in_place(source: SourceModel, state: Path) -> None:
    async with serving(source.folder, manifest=source.manifest) as coordinator:
        request = SliceRequest(source.manifest.id, LayerRange(0, LAYERS), LAYERS, source.folder)
        async with Credentials().channel(coordinator.address) as channel:
            await ensure_slice(request, shelf=Shelf(state), channel=channel, progress=lambda _: None)


def test_removing_frees_the_disk_but_not_under_a_running_node(tmp_path: Path, source: SourceModel) -> None:
    shelf = Shelf(tmp_path / "state" / "node")
    source.put(shelf).close()
    with StateDir(tmp_path / "state" / "node"):
        refused = _models(tmp_path / "state", "remove", "org/tiny")
        assert refused.returncode == 1
        assert f"process {os.getpid()}" in refused.stderr
    removed = _said(_models(tmp_path / "state", "remove", source.manifest.id[:12], "--json"))["removed"]
    assert [item["id"] for item in removed] == [source.manifest.id]
    assert shelf.stores() == ()


def test_damage_is_named_and_fetched_again_at_the_next_load(tmp_path: Path, source: SourceModel) -> None:
    shelf = Shelf(tmp_path / "state" / "node")
    source.put(shelf).close()
    assert _models(tmp_path / "state", "verify", "org/tiny").returncode == 0
    tensor = source.manifest.tensors[3]
    store = shelf.store(source.manifest.id)
    with (store.folder / tensor.file).open("r+b") as file:
        file.seek(tensor.begin + 9)
        file.write(b"?!")
    result = _models(tmp_path / "state", "verify", "org/tiny", "--json")
    assert result.returncode == 1
    assert _said(result)["verified"][0]["damaged"] == [tensor.name]
    store.open(source.manifest)
    assert [t.name for t in source.manifest.tensors if not store.is_verified(t)] == [tensor.name]
    store.close()


def test_a_model_that_is_nowhere_is_an_error_that_says_what_is_here(tmp_path: Path, source: SourceModel) -> None:
    source.put(Shelf(tmp_path / "state" / "node")).close()
    result = _models(tmp_path / "state", "verify", "org/other")
    assert result.returncode == 1
    assert "there is org/tiny" in result.stderr


def test_a_pulled_model_is_here_and_tells_its_source_revision_and_licence(tmp_path: Path, source: SourceModel) -> None:
    (source.folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with hub_server() as hub:
        hub.repositories["org/tiny"] = Repository(source.folder, _COMMIT)
        here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        missing = _models(tmp_path / "state", "provenance", "org/tiny", **here)
        assert missing.returncode == 1
        assert "models pull org/tiny" in missing.stderr
        pulled = _said(_models(tmp_path / "state", "pull", "org/tiny", "--json", **here))
        assert (pulled["revision"], pulled["id"]) == (_COMMIT, source.manifest.id)
        told = _said(_models(tmp_path / "state", "provenance", "org/tiny", "--json", **here))
        assert _models(tmp_path / "state", "verify", "org/tiny", **here).returncode == 0
        name = source.manifest.tensors[0].file
        with (Path(pulled["folder"]) / name).open("r+b") as file:
            file.seek(5000)
            file.write(b"?!")
        (Path(pulled["folder"]) / "tokenizer.json").resolve().write_text("{}")
        (Path(pulled["folder"]) / "config.json").unlink()
        (Path(pulled["folder"]) / "config.json").write_bytes((source.folder / "config.json").read_bytes())
        verified = _models(tmp_path / "state", "verify", "org/tiny", "--json", **here)
        [found] = _said(verified)["verified"]
        assert (verified.returncode, found["damaged"]) == (1, sorted([name, "tokenizer.json"]))
        assert found["unchecked"] == ["config.json"], "nothing says what it should be"
    assert (told["source"], told["revision"], told["licence"]) == (f"{hub.url}/org/tiny", _COMMIT, "apache-2.0")
    hashes = {entry["name"]: entry["sha256"] for entry in told["files"]}
    assert hashes == {entry.name: entry.sha256 for entry in source.manifest.files}


def test_a_stores_provenance_needs_neither_hub_nor_coordinator(tmp_path: Path, source: SourceModel) -> None:
    source.put(Shelf(tmp_path / "state" / "node"), source.manifest.tensors[:2]).close()
    told = _said(_models(tmp_path / "state", "provenance", "org/tiny", "--json", HF_HUB_OFFLINE="1"))
    assert (told["source"], told["revision"], told["id"]) == ("here", "r", source.manifest.id)
