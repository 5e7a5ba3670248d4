"""MODEL as a GGUF file on the hub: planned from its header, downloaded, converted, and found again offline."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli.serve import potluck_command
from cluster.models.checkpoint import open_checkpoint
from coordinator.gguf.layout import lay_out
from coordinator.gguf.source import open_gguf
from tests.gguf_blocks import stored
from tests.gguf_paper import HEAD_DIM, METADATA, paper_gguf, paper_tensors
from tests.integration.hub_server import Hub, Repository, hub_server

_COMMIT = "5" * 40


class Site:
    """A hub with GGUF files alone, and a machine with nothing."""

    def __init__(self, hub: Hub, files: Path, home: Path) -> None:
        self.hub, self.files, self.home = hub, files, home

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name}
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = potluck_command(*arguments, "--state", str(self.home / "state"))
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=kept | settings | environment
        )

    def pull(self, model: str, **environment: str) -> Any:
        result = self.run("models", "pull", model, "--json", **environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A Llama 3 whose rotation only the tensor's numbers tell, and the same model in two files."""
    factors = stored(_llama3_factors(), "F32")
    tensors = paper_tensors() | {"rope_freqs.weight": factors}
    paper_gguf(tmp_path / "hub" / "paper.Q4_K.gguf", None, tensors)
    for number in (0, 1):
        first = {"split.count": 2} if number == 0 else dict.fromkeys(METADATA)
        part = tmp_path / "hub" / f"set-{number + 1:05}-of-00002.gguf"
        paper_gguf(part, {**first, "split.no": number}, dict(list(tensors.items())[number::2]))
    with hub_server() as hub:
        hub.repositories["org/paper"] = Repository(tmp_path / "hub", _COMMIT)
        yield Site(hub, tmp_path / "hub", tmp_path / "home")


def _llama3_factors() -> Any:
    """Of a model trained with 1,024 tokens first: some pairs of dimensions turn often within them, others do not."""
    factors = []
    for pair in range(HEAD_DIM // 2):
        turns = 1024 / (2 * math.pi * 10_000 ** (2 * pair / HEAD_DIM))
        kept = min(max((turns - 1) / 3, 0.0), 1.0)
        factors.append(1 / ((1 - kept) / 8 + kept))
    return np.array(factors, np.float32)


def test_one_file_is_downloaded_converted_and_found_again_offline(site: Site) -> None:
    pulled = site.pull("org/paper/paper.Q4_K.gguf")
    assert (pulled["name"], pulled["revision"]) == ("org/paper/paper.Q4_K", _COMMIT)
    local = lay_out(open_gguf(site.files / "paper.Q4_K.gguf")).checkpoint()
    made = open_checkpoint(Path(pulled["folder"]))
    assert (made.config, dict(made.tensors)) == (local.config, dict(local.tensors))
    assert set(site.hub.sent_bytes) == {"paper.Q4_K.gguf"}
    site.hub.requests.clear()
    assert site.pull("org/paper/paper.Q4_K.gguf", HF_HUB_OFFLINE="1") == pulled
    told = json.loads(site.run("models", "provenance", "org/paper/paper.Q4_K.gguf", "--json").stdout)
    assert (told["source"], told["revision"]) == (f"{site.hub.url}/org/paper", _COMMIT)
    assert told["conversions"]
    assert site.hub.requests == []


def test_all_parts_of_a_set_are_downloaded(site: Site) -> None:
    pulled = site.pull("org/paper/set-00001-of-00002.gguf")
    assert pulled["name"] == "org/paper/set"
    local = lay_out(open_gguf(site.files / "paper.Q4_K.gguf")).checkpoint()
    assert open_checkpoint(Path(pulled["folder"])).tensors.keys() == local.tensors.keys()


def test_a_file_is_planned_from_its_header(site: Site) -> None:
    result = site.run("plan", "org/paper/paper.Q4_K.gguf", "--json", "--no-mdns")
    assert result.returncode == 0, result.stderr
    local = site.run("plan", str(site.files / "paper.Q4_K.gguf"), "--json", "--no-mdns")
    planned, expected = (json.loads(text)["stages"][0]["weight_bytes"] for text in (result.stdout, local.stdout))
    assert planned == expected
    assert not (site.home / "state" / "coordinator").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("org/paper", "holds GGUF files: name one of them, such as org/paper/paper.Q4_K.gguf"),
        ("org/paper/other.gguf", "has no file other.gguf; it has paper.Q4_K.gguf, set-00001-of-00002.gguf"),
    ],
)
def test_which_files_there_are_is_said(model: str, said: str, site: Site) -> None:
    result = site.run("models", "pull", model)
    assert result.returncode == 1
    assert said in result.stderr
