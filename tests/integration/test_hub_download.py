"""MODEL as a hub id: downloaded from a hub on loopback by a process that knows it only by HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.models import hashing
from cluster.models.checkpoint import open_checkpoint
from cluster.models.manifest import build_manifest
from tests.integration.hub_server import Hub, Repository, hub_server
from tests.weight_files import write_model

_ROOT = Path(__file__).parents[2]
_COMMIT, _NEXT_COMMIT = "1" * 40, "2" * 40
_TENSOR_BYTES = 256 * 1024
_WEIGHTS = "model-00001-of-00002.safetensors"

_CLIENT = """
import json, os, pathlib, sys
from cluster.errors import PotluckError
from coordinator.hub import resolve_model
progress = []
try:
    found = resolve_model(
        sys.argv[1],
        conversions=pathlib.Path(),
        progress=lambda *now: progress.append(now),
        hashes=pathlib.Path(os.environ["HF_HOME"], "hashes"),
    )
    said = {"folder": str(found.folder), "name": found.name, "revision": found.revision, "progress": progress}
except PotluckError as error:
    said = {"error": str(error), "kind": type(error).__name__}
print(json.dumps(said))
"""


@dataclass
class _Site:
    """A hub with one model, and a machine with an empty cache."""

    hub: Hub
    model: Path
    home: Path

    @property
    def repository(self) -> Repository:
        return self.hub.repositories["org/tiny"]

    def start(self, model: str = "org/tiny", *, before: str = "", **environment: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name}
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", before + _CLIENT, model],
            cwd=_ROOT,
            env=kept | settings | {"HF_HUB_DOWNLOAD_TIMEOUT": "3"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def resolve(self, model: str = "org/tiny", *, before: str = "", **environment: str) -> dict[str, Any]:
        process = self.start(model, before=before, **environment)
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0, errors
        said: dict[str, Any] = json.loads(output)
        return said | {"log": errors}

    def wait_for_parts(self, size_bytes: int) -> None:
        """Wait until so much of unfinished files is on the disk."""
        parts = self.home / "hub" / "models--org--tiny" / "blobs"
        until = time.monotonic() + 30
        while sum(path.stat().st_size for path in parts.glob("*.incomplete")) < size_bytes:
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[_Site]:
    model = write_model(tmp_path / "hub", tensor_bytes=_TENSOR_BYTES, shards=2)
    (model / "pytorch_model.bin").write_bytes(bytes(1000))
    (model / "consolidated.safetensors").write_bytes(bytes(1000))
    with hub_server() as hub:
        hub.repositories["org/tiny"] = Repository(model, _COMMIT)
        yield _Site(hub, model, tmp_path / "home")


def test_the_needed_files_arrive_at_a_pinned_revision(site: _Site) -> None:
    said = site.resolve()
    assert (said["name"], said["revision"]) == ("org/tiny", _COMMIT)
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


def test_a_token_goes_to_the_hub_and_nowhere_else(site: _Site) -> None:
    assert site.resolve(HF_TOKEN="hf_secret")["revision"] == _COMMIT
    assert site.hub.tokens_seen == {"api", "small"}


def test_a_second_start_downloads_nothing_and_an_offline_one_asks_nothing(site: _Site) -> None:
    first = site.resolve()
    sent = dict(site.hub.sent_bytes)
    assert site.resolve()["folder"] == first["folder"]
    assert site.hub.sent_bytes == sent
    site.hub.requests.clear()
    offline = site.resolve(HF_HUB_OFFLINE="1")
    assert (offline["folder"], offline["revision"]) == (first["folder"], _COMMIT)
    assert site.hub.requests == []


def test_a_commit_that_is_here_is_not_asked_for(site: _Site) -> None:
    site.resolve(f"org/tiny@{_COMMIT}")
    site.hub.requests.clear()
    assert site.resolve(f"org/tiny@{_COMMIT}")["revision"] == _COMMIT
    assert site.hub.requests == []


def test_a_newer_commit_is_noticed_and_its_unchanged_files_are_not_sent_again(site: _Site) -> None:
    site.resolve()
    site.repository.commit = _NEXT_COMMIT
    (site.model / "tokenizer.json").write_text('{"newer": true}')
    sent = site.hub.sent_bytes[_WEIGHTS]
    said = site.resolve()
    assert said["revision"] == _NEXT_COMMIT
    assert json.loads((Path(said["folder"]) / "tokenizer.json").read_text()) == {"newer": True}
    assert site.hub.sent_bytes[_WEIGHTS] == sent


def test_offline_without_a_copy_says_so(site: _Site) -> None:
    said = site.resolve(HF_HUB_OFFLINE="1")
    assert said["kind"] == "ModelError"
    assert "HF_HUB_OFFLINE" in said["error"]
    assert site.hub.requests == []


def test_a_killed_download_goes_on_where_it_was(site: _Site) -> None:
    site.hub.stall_after_bytes = 512 * 1024
    process = site.start(HF_HUB_DOWNLOAD_TIMEOUT="60")
    try:
        site.wait_for_parts(1024 * 1024)  # half a MiB of each
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    site.hub.stall_after_bytes = None
    for half in ("org/tiny", f"org/tiny@{_COMMIT}"):
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


def test_a_connection_that_breaks_is_taken_up_again(site: _Site) -> None:
    site.hub.cut_after_bytes = 512 * 1024
    folder = Path(site.resolve()["folder"])
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (site.model / path.name).read_bytes()
        assert site.hub.sent_bytes[path.name] == path.stat().st_size


@pytest.mark.parametrize("busy", [0, 2], ids=["at once", "after two answers 503"])
def test_a_connection_that_is_reset_is_taken_up_where_it_was(site: _Site, busy: int) -> None:
    site.hub.stall_after_bytes = 512 * 1024
    process = site.start(HF_HUB_DOWNLOAD_TIMEOUT="60")
    try:
        site.wait_for_parts(1024 * 1024)  # half a MiB of each: a reset loses what nobody has read yet
        requests = len(site.hub.requests)
        site.hub.busy_status, site.hub.busy_answers["large"] = 503, busy
        site.hub.resets, site.hub.stall_after_bytes = True, None
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    said = json.loads(output)
    assert "error" not in said, said
    asked = [(path, first) for _, path, first in site.hub.requests[requests:] if path.startswith("/large/")]
    assert len(asked) == 2 + busy
    assert min(first for _, first in asked) >= 512 * 1024
    for path in Path(said["folder"]).glob("*.safetensors"):
        assert path.read_bytes() == (site.model / path.name).read_bytes()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("kind", ["api", "small", "large"])
def test_a_hub_that_is_busy_is_left_alone_for_as_long_as_it_asks(site: _Site, kind: str, status: int) -> None:
    site.hub.busy_answers[kind], site.hub.busy_status = 3, status
    said = site.resolve()
    assert "error" not in said, said
    assert site.hub.busy_answers[kind] == 0
    if kind != "small":  # for which the library has a way of its own: its second question comes at once
        assert site.hub.impatient == 0
    for path in Path(said["folder"]).iterdir():
        assert path.read_bytes() == (site.model / path.name).read_bytes()
    if kind == "api":
        assert f"HTTP status {status} to the question for org/tiny; asking again in 1 s" in said["log"]


def test_a_hub_that_stays_busy_is_not_asked_for_ever(site: _Site) -> None:
    site.hub.busy_answers["api"] = 100
    assert "try again later" in site.resolve()["error"]
    assert site.hub.busy_answers["api"] == 95


def test_a_cached_model_does_not_wait_for_a_busy_hub(site: _Site) -> None:
    site.resolve()
    site.hub.busy_answers["api"] = 100
    assert site.resolve()["revision"] == _COMMIT
    assert site.hub.busy_answers["api"] == 99


@pytest.mark.parametrize("cut", [None, 512 * 1024], ids=["in one piece", "in two"])
def test_a_downloaded_model_is_not_read_again_to_be_hashed(
    site: _Site, cut: int | None, monkeypatch: pytest.MonkeyPatch
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
    assert read and max(read) < _TENSOR_BYTES, "only small files"


def test_a_size_that_is_told_only_beside_the_hash_counts(site: _Site) -> None:
    site.hub.tells_file_sizes = False
    said = site.resolve()
    total = sum(path.stat().st_size for path in Path(said["folder"]).iterdir())
    assert said["progress"][-1] == [total, total]


def test_files_whose_sizes_are_told_nowhere_arrive_all_the_same(site: _Site) -> None:
    site.hub.tells_file_sizes = site.hub.tells_lfs_sizes = False
    said = site.resolve()
    assert "error" not in said, said
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        assert (Path(said["folder"]) / name).read_bytes() == (site.model / name).read_bytes()


_ANY_FILE = ["config.json", "tokenizer.json", "README.md", "model.safetensors.index.json", _WEIGHTS]


@pytest.mark.parametrize("name", _ANY_FILE)
def test_a_file_that_is_damaged_on_its_way_is_fetched_again(site: _Site, name: str) -> None:
    site.hub.damage[name] = 1
    said = site.resolve()
    assert "error" not in said, said
    assert site.hub.damage[name] == 0
    assert (Path(said["folder"]) / name).read_bytes() == (site.model / name).read_bytes()


@pytest.mark.parametrize("name", _ANY_FILE)
def test_other_bytes_than_announced_are_never_used(site: _Site, name: str) -> None:
    site.hub.damage[name] = 1000
    said = site.resolve()
    assert said["kind"] == "ModelError"
    kind = "SHA-256" if name == _WEIGHTS else "git id"
    assert f"{name}" in said["error"] and f"twice with another {kind}" in said["error"]
    assert "check whether a proxy changes downloads" in said["error"]
    for half in ("org/tiny", f"org/tiny@{_COMMIT}"):
        assert "error" in site.resolve(half, HF_HUB_OFFLINE="1")
    site.hub.damage.clear()
    assert (Path(site.resolve()["folder"]) / name).read_bytes() == (site.model / name).read_bytes()


def test_a_damaged_file_that_another_program_left_is_fetched_again(site: _Site) -> None:
    folder = Path(site.resolve()["folder"])
    (folder / "tokenizer.json").resolve().write_bytes(b"{}")
    site.resolve()
    assert (folder / "tokenizer.json").read_bytes() == (site.model / "tokenizer.json").read_bytes()


def test_a_mirror_that_tells_no_hashes_is_believed_and_that_is_said(site: _Site) -> None:
    site.hub.is_plain = True
    said = site.resolve()
    assert "error" not in said, said
    assert "tells no hashes of" in said["log"]
    assert "tells no hashes of" not in site.resolve(f"org/tiny@{_COMMIT}")["log"], "nothing was fetched"


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", ["gated", "hf auth login", "HF_TOKEN"]),
        (401, "GatedRepo", ["gated", "hf auth login"]),
        (403, "", ["refuses", "hf auth login"]),
        (503, "", ["try again later"]),
    ],
)
def test_a_refusing_hub_is_explained(site: _Site, status: int, code: str, words: list[str]) -> None:
    site.repository.status, site.repository.error_code = status, code
    said = site.resolve()
    assert all(word in said["error"] for word in words), said["error"]


def test_a_model_that_does_not_exist_is_not_found(site: _Site) -> None:
    assert "shows no model org/other" in site.resolve("org/other")["error"]


def test_a_revision_that_does_not_exist_is_named(site: _Site) -> None:
    assert "no revision 'nope'" in site.resolve("org/tiny@nope")["error"]


def test_a_repository_without_safetensors_is_refused_before_anything_is_downloaded(site: _Site) -> None:
    for path in site.model.glob("*.safetensors"):
        path.unlink()
    assert "no safetensors" in site.resolve()["error"]
    assert site.hub.sent_bytes == {}


def test_a_hub_that_does_not_answer_is_said_and_a_cached_copy_used(site: _Site) -> None:
    nobody = "http://127.0.0.1:9"
    assert "cannot reach" in site.resolve(HF_ENDPOINT=nobody)["error"]
    site.resolve()
    assert site.resolve(HF_ENDPOINT=nobody)["revision"] == _COMMIT


def test_a_disk_without_room_is_said_before_the_weights_are_asked_for(site: _Site) -> None:
    said = site.resolve(before="import shutil, types; shutil.disk_usage = lambda _: types.SimpleNamespace(free=10**6)")
    assert "2.5 MiB too little" in said["error"], said
    assert "HF_HOME" in said["error"]
    assert not any(path.startswith("/large/") for _, path, _ in site.hub.requests)
