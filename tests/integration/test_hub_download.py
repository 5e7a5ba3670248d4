"""MODEL as a hub id: downloaded from a hub on loopback by a process that knows it only by HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.models import hashing
from cluster.models.checkpoint import open_checkpoint
from cluster.models.manifest import build_manifest
from tests.integration.hub_site import COMMIT, NEXT_COMMIT, TENSOR_BYTES, WEIGHTS, Site, hub_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with hub_site(tmp_path) as site:
        yield site


def test_the_needed_files_arrive_at_a_pinned_revision(site: Site) -> None:
    said = site.resolve()
    assert (said["name"], said["revision"]) == ("org/tiny", COMMIT)
    folder = Path(said["folder"])
    assert {path.name for path in folder.iterdir()} == {
        "README.md",  # serving does not need it, but it names the licence
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    for path in folder.iterdir():
        assert path.read_bytes() == (site.model / path.name).read_bytes()
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert said["progress"][-1] == [total, total]


def test_a_token_goes_to_the_hub_and_nowhere_else(site: Site) -> None:
    assert site.resolve(HF_TOKEN="hf_secret")["revision"] == COMMIT
    assert site.hub.tokens_seen == {"api", "small"}


def test_a_second_start_downloads_nothing_and_an_offline_one_asks_nothing(site: Site) -> None:
    first = site.resolve()
    sent = dict(site.hub.sent_bytes)
    assert site.resolve()["folder"] == first["folder"]
    assert site.hub.sent_bytes == sent
    site.hub.requests.clear()
    offline = site.resolve(HF_HUB_OFFLINE="1")
    assert (offline["folder"], offline["revision"]) == (first["folder"], COMMIT)
    assert site.hub.requests == []


def test_a_commit_that_is_here_is_not_asked_for(site: Site) -> None:
    site.resolve(f"org/tiny@{COMMIT}")
    site.hub.requests.clear()
    assert site.resolve(f"org/tiny@{COMMIT}")["revision"] == COMMIT
    assert site.hub.requests == []


def test_a_newer_commit_is_noticed_and_its_unchanged_files_are_not_sent_again(site: Site) -> None:
    site.resolve()
    site.repository.commit = NEXT_COMMIT
    (site.model / "tokenizer.json").write_text('{"newer": true}')
    sent = site.hub.sent_bytes[WEIGHTS]
    said = site.resolve()
    assert said["revision"] == NEXT_COMMIT
    assert json.loads((Path(said["folder"]) / "tokenizer.json").read_text()) == {"newer": True}
    assert site.hub.sent_bytes[WEIGHTS] == sent


def test_offline_without_a_copy_says_so(site: Site) -> None:
    said = site.resolve(HF_HUB_OFFLINE="1")
    assert said["kind"] == "ModelError"
    assert "HF_HUB_OFFLINE" in said["error"]
    assert site.hub.requests == []


def test_a_killed_download_goes_on_where_it_was(site: Site) -> None:
    site.hub.stall_after_bytes = 512 * 1024
    process = site.start(HF_HUB_DOWNLOAD_TIMEOUT="60")
    try:
        site.wait_for_parts(1024 * 1024)  # half a MiB of each
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    site.hub.stall_after_bytes = None
    for half in ("org/tiny", f"org/tiny@{COMMIT}"):
        assert "error" in site.resolve(half, HF_HUB_OFFLINE="1"), "half a model must not pass for a whole one"
    before, requests = dict(site.hub.sent_bytes), len(site.hub.requests)
    said = site.resolve()
    resumed = {path: first for _, path, first in site.hub.requests[requests:] if path.startswith("/large/")}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        assert resumed[f"/large/org/tiny/{name}"] >= 512 * 1024
        size = (site.model / name).stat().st_size
        assert site.hub.sent_bytes[name] - before[name] <= size - 512 * 1024
        assert (Path(said["folder"]) / name).read_bytes() == (site.model / name).read_bytes()


@pytest.mark.parametrize("cut", [None, 512 * 1024], ids=["in one piece", "in two"])
def test_a_downloaded_model_is_not_read_again_to_be_hashed(
    site: Site, cut: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.hub.cut_after_bytes = cut
    expected = build_manifest(open_checkpoint(site.model), name="", revision="")
    folder = Path(site.resolve()["folder"])
    read, read_and_hash = [], hashing._read_and_hash

    def note(path: Path, *args: Any) -> Any:
        read.append(path.stat().st_size)
        return read_and_hash(path, *args)

    monkeypatch.setattr(hashing, "_read_and_hash", note)
    found = build_manifest(open_checkpoint(folder), name="", revision="", cache=site.home / "hashes")
    assert found.tensors == expected.tensors
    assert found.id == expected.id
    assert read and max(read) < TENSOR_BYTES, "only small files"


def test_a_size_that_is_told_only_beside_the_hash_counts(site: Site) -> None:
    site.hub.tells_file_sizes = False
    said = site.resolve()
    total = sum(path.stat().st_size for path in Path(said["folder"]).iterdir())
    assert said["progress"][-1] == [total, total]


def test_files_whose_sizes_are_told_nowhere_arrive_all_the_same(site: Site) -> None:
    site.hub.tells_file_sizes = site.hub.tells_lfs_sizes = False
    said = site.resolve()
    assert "error" not in said, said
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        assert (Path(said["folder"]) / name).read_bytes() == (site.model / name).read_bytes()


def test_a_mirror_that_tells_no_hashes_is_believed_and_that_is_said(site: Site) -> None:
    site.hub.is_plain = True
    said = site.resolve()
    assert "error" not in said, said
    assert "tells no hashes of" in said["log"]
    assert "tells no hashes of" not in site.resolve(f"org/tiny@{COMMIT}")["log"], "nothing was fetched"


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", ["gated", "hf auth login", "HF_TOKEN"]),
        (401, "GatedRepo", ["gated", "hf auth login"]),
        (403, "", ["refuses", "hf auth login"]),
        (503, "", ["try again later"]),
    ],
)
def test_a_refusing_hub_is_explained(site: Site, status: int, code: str, words: list[str]) -> None:
    site.repository.status, site.repository.error_code = status, code
    said = site.resolve()
    assert all(word in said["error"] for word in words), said["error"]


def test_a_model_that_does_not_exist_is_not_found(site: Site) -> None:
    assert "shows no model org/other" in site.resolve("org/other")["error"]


def test_a_revision_that_does_not_exist_is_named(site: Site) -> None:
    assert "no revision 'nope'" in site.resolve("org/tiny@nope")["error"]


def test_a_repository_without_safetensors_is_refused_before_anything_is_downloaded(site: Site) -> None:
    for path in site.model.glob("*.safetensors"):
        path.unlink()
    assert "no safetensors" in site.resolve()["error"]
    assert site.hub.sent_bytes == {}


def test_a_hub_that_does_not_answer_is_said_and_a_cached_copy_used(site: Site) -> None:
    nobody = "http://127.0.0.1:9"
    assert "cannot reach" in site.resolve(HF_ENDPOINT=nobody)["error"]
    site.resolve()
    assert site.resolve(HF_ENDPOINT=nobody)["revision"] == COMMIT


def test_a_disk_without_room_is_said_before_the_weights_are_asked_for(site: Site) -> None:
    said = site.resolve(before="import shutil, types; shutil.disk_usage = lambda _: types.SimpleNamespace(free=10**6)")
    assert "2.5 MiB too little" in said["error"], said
    assert "HF_HOME" in said["error"]
    assert not any(path.startswith("/large/") for _, path, _ in site.hub.requests)
