"""`potluck serve org/name` with a hub on loopback: the endpoint answers while the model is still on its way."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from cluster.cli.child import running
from coordinator.builtin import demo_model_path
from tests.integration.hub_server import Hub, Repository, hub_server
from tests.integration.live import (
    START_S,
    Coordinator,
    eventually,
    happenings,
    joined,
    new_cluster,
    processes_of,
    serving,
)
from tests.integration.mounts import hiding, require_mounts

_COMMIT = "3" * 40
_STALL_AFTER_BYTES = 2 * 1024 * 1024

STOPPED_S = 2.0
"""What is promised of SIGTERM; tests allow three times as much."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with the built-in model, as if somebody had published it."""
    shutil.copytree(demo_model_path(), tmp_path / "published", ignore=shutil.ignore_patterns("__*"))
    with hub_server() as hub:
        hub.repositories["org/tiny"] = Repository(tmp_path / "published", _COMMIT)
        yield hub


def _environment(hub: Hub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "60", "HF_HUB_OFFLINE": "0"}


def _serving(hub: Hub, folder: Path) -> AbstractContextManager[Coordinator]:
    options = ["--no-local-node", "--no-mdns"]
    env = _environment(hub, folder / "home")
    return serving("org/tiny", new_cluster(), folder / "state", *options, context=64, users=1, env=env)


def _parts(folder: Path) -> int:
    blobs = folder / "home" / "hub" / "models--org--tiny" / "blobs"
    return sum(path.stat().st_size for path in blobs.glob("*.incomplete"))


@contextmanager
def _stalled(hub: Hub, folder: Path) -> Iterator[Coordinator]:
    """A coordinator whose download stands still in the middle."""
    hub.stall_after_bytes = _STALL_AFTER_BYTES
    with _serving(hub, folder) as coordinator:
        eventually(lambda: _parts(folder) >= _STALL_AFTER_BYTES, "half of the model is here", START_S)
        yield coordinator


def test_the_endpoint_says_how_far_the_download_is(hub: Hub, tmp_path: Path) -> None:
    with _stalled(hub, tmp_path) as coordinator:
        told = re.compile(r"downloading org/tiny: 2\.\d MiB of 6\.9 MiB")  # follows what arrived by a moment
        eventually(lambda: told.search(coordinator.get("/health").json()["reason"]), "2 MiB are said to be here")
        health = coordinator.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "ok")
        assert coordinator.get("/ready").status_code == 503
        assert "downloading org/tiny" in coordinator.status()["reason"]
        refused = coordinator.post("/v1/completions", {"prompt": "hello"})
        assert refused.status_code == 503
        assert "downloading org/tiny" in refused.json()["error"]["message"]
        hub.stall_after_bytes = None


def test_a_stopped_download_ends_soon_and_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    with _stalled(hub, tmp_path) as coordinator:
        began = time.monotonic()
        os.kill(coordinator.process.pid, signal.SIGTERM)
        eventually(lambda: coordinator.process.exit_code is not None, "the coordinator has ended")
        took_s = time.monotonic() - began
        assert coordinator.process.exit_code == 0, coordinator.process.output()
        assert "Traceback" not in coordinator.process.output()
        assert took_s < 3 * STOPPED_S
    kept_bytes = _parts(tmp_path)
    assert kept_bytes >= _STALL_AFTER_BYTES
    hub.stall_after_bytes = None
    hub.requests.clear()
    with _serving(hub, tmp_path) as coordinator:
        coordinator.process.wait_for("waiting", START_S)
    asked_from = [first for method, path, first in hub.requests if path.startswith("/large/") and method == "GET"]
    assert asked_from == [0, kept_bytes], "the header, to know the model early, and then what was missing"


def test_what_cannot_be_served_is_refused_before_it_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    arguments = ["serve", "org/tiny", "--cluster", new_cluster(), "--state", str(tmp_path / "state"), "--port", "0"]
    command = [*arguments, "--no-mdns", "--context", "1000000"]
    with running("coordinator", command, env=_environment(hub, tmp_path / "home")) as process:
        eventually(lambda: process.exit_code is not None, "the coordinator has ended", START_S)
        assert "--context 1000000 is more than the" in process.output()
    assert hub.sent_bytes["model.safetensors"] < 1024 * 1024, "no more than its header"


def test_a_mirror_that_tells_no_sizes_and_hashes_serves_as_well(hub: Hub, tmp_path: Path) -> None:
    hub.is_plain = True
    with _serving(hub, tmp_path) as coordinator:
        coordinator.process.wait_for("waiting", START_S)


def test_the_status_says_which_commit_is_served(hub: Hub, tmp_path: Path) -> None:
    with _serving(hub, tmp_path) as coordinator:
        coordinator.process.wait_for("waiting", START_S)
        model = coordinator.status()["model"]
        assert (model["source"], model["revision"]) == ("org/tiny", _COMMIT)


@pytest.mark.parametrize("kind", ["api", "small", "large"])
def test_a_hub_that_is_busy_for_a_moment_ends_nothing(kind: str, hub: Hub, tmp_path: Path) -> None:
    hub.busy_answers[kind] = 2
    with _serving(hub, tmp_path) as coordinator:
        coordinator.process.wait_for("waiting", START_S)
    assert hub.busy_answers[kind] == 0


def test_a_cached_model_that_is_not_what_was_published_is_refused(hub: Hub, tmp_path: Path) -> None:
    """Other programs put files into the same cache, and need not look at what they got."""
    with _serving(hub, tmp_path) as coordinator:
        coordinator.process.wait_for("waiting", START_S)
    [weights] = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    arguments = ["serve", "org/tiny", "--cluster", new_cluster(), "--state", str(tmp_path / "state"), "--port", "0"]
    with running("coordinator", [*arguments, "--no-mdns"], env=_environment(hub, tmp_path / "home")) as process:
        eventually(lambda: process.exit_code is not None, "the coordinator has ended", START_S)
        assert f"is not the file that was published: remove {weights.resolve()}" in process.output()


@pytest.mark.root
def test_a_node_with_an_empty_disk_answers_and_the_hub_is_read_once(hub: Hub, tmp_path: Path) -> None:
    """The node sees neither the hub nor the coordinator's cache."""
    require_mounts()
    home, published = tmp_path / "home", tmp_path / "published"
    blind = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "other")}
    env = _environment(hub, home)
    home.mkdir()
    options = ["--no-local-node", "--no-mdns"]
    with serving("org/tiny", new_cluster(), tmp_path / "state", *options, context=64, users=1, env=env) as coordinator:
        join = ["--no-mdns", "--coordinator", f"127.0.0.1:{coordinator.port}"]
        disk = hiding(home, published)
        with joined("far", "torch", coordinator.cluster, tmp_path / "far", *join, prefix=disk, env=blind):
            coordinator.wait_ready()
            answer = coordinator.post("/v1/completions", {"prompt": "Hello", "max_tokens": 4}).json()
            assert answer["usage"]["completion_tokens"] > 0
        loaded = [said["report"] for said in happenings(coordinator.process, "loading")]
        size = (published / "model.safetensors").stat().st_size
        assert max(report["received_bytes"] for report in loaded) > 0.9 * size
    assert hub.sent_bytes["model.safetensors"] - size < 1024 * 1024, "once, and its header"


@pytest.mark.root
@pytest.mark.skipif(sys.platform != "linux", reason="reads processes' memory in /proc")
def test_the_hubs_token_reaches_no_node_and_no_other_host(hub: Hub, tmp_path: Path) -> None:
    """It is nowhere in the memory of a node: not from its environment, nor by any call or frame."""
    token = f"hf_{secrets.token_hex(12)}"
    env = _environment(hub, tmp_path / "home") | {"HF_TOKEN": token}
    options = ["--no-mdns", "--min-nodes", "2"]
    with serving("org/tiny", new_cluster(), tmp_path / "state", *options, context=64, users=1, env=env) as coordinator:
        join = ["--no-mdns", "--coordinator", f"127.0.0.1:{coordinator.port}"]
        with joined("far", "torch", coordinator.cluster, tmp_path / "far", *join) as far:
            coordinator.wait_ready()
            assert coordinator.post("/v1/completions", {"prompt": "Hello", "max_tokens": 4}).status_code == 200
            found = {process.pid for process in processes_of(coordinator.cluster) if _has_in_memory(process.pid, token)}
            nodes = {process.pid for process in processes_of(coordinator.cluster)} - {coordinator.process.pid}
    assert far.pid in nodes and len(nodes) >= 2, "the node beside the coordinator is a process of its own"
    assert found == {coordinator.process.pid}
    assert hub.tokens_seen == {"api", "small"}


def _has_in_memory(pid: int, text: str) -> bool:
    """Whether a process holds `text` anywhere that it can write to; its environment lies there too."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            addresses, rights, *_ = line.split()
            begin, end = (int(address, 16) for address in addresses.split("-"))
            if rights.startswith("rw"):
                with suppress(OSError):  # what a device has mapped cannot be read
                    memory.seek(begin)
                    if text.encode() in memory.read(end - begin):
                        return True
    return False


def test_a_model_that_the_hub_does_not_have_ends_the_command(hub: Hub, tmp_path: Path) -> None:
    arguments = ["serve", "org/other", "--cluster", new_cluster(), "--state", str(tmp_path / "state"), "--port", "0"]
    with running("coordinator", [*arguments, "--no-mdns"], env=_environment(hub, tmp_path / "home")) as process:
        eventually(lambda: process.exit_code is not None, "the coordinator has ended", START_S)
        assert process.exit_code == 1
        assert "shows no model org/other" in process.output()
        assert "Traceback" not in process.output()
