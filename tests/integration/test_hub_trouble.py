"""A hub that is busy, resets connections or sends wrong bytes: waited for, taken up again, and never believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.hub_site import COMMIT, WEIGHTS, Site, hub_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with hub_site(tmp_path) as site:
        yield site


_ANY_FILE = ["config.json", "tokenizer.json", "README.md", "model.safetensors.index.json", WEIGHTS]


def test_a_connection_that_breaks_is_taken_up_again(site: Site) -> None:
    site.hub.cut_after_bytes = 512 * 1024
    folder = Path(site.resolve()["folder"])
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (site.model / path.name).read_bytes()
        assert site.hub.sent_bytes[path.name] == path.stat().st_size


@pytest.mark.parametrize("busy", [0, 2], ids=["at once", "after two answers 503"])
def test_a_connection_that_is_reset_is_taken_up_where_it_was(site: Site, busy: int) -> None:
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
def test_a_hub_that_is_busy_is_left_alone_for_as_long_as_it_asks(site: Site, kind: str, status: int) -> None:
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


def test_a_hub_that_stays_busy_is_not_asked_for_ever(site: Site) -> None:
    site.hub.busy_answers["api"] = 100
    assert "try again later" in site.resolve()["error"]
    assert site.hub.busy_answers["api"] == 95


def test_a_cached_model_does_not_wait_for_a_busy_hub(site: Site) -> None:
    site.resolve()
    site.hub.busy_answers["api"] = 100
    assert site.resolve()["revision"] == COMMIT
    assert site.hub.busy_answers["api"] == 99


@pytest.mark.parametrize("name", _ANY_FILE)
def test_a_file_that_is_damaged_on_its_way_is_fetched_again(site: Site, name: str) -> None:
    site.hub.damage[name] = 1
    said = site.resolve()
    assert "error" not in said, said
    assert site.hub.damage[name] == 0
    assert (Path(said["folder"]) / name).read_bytes() == (site.model / name).read_bytes()


@pytest.mark.parametrize("name", _ANY_FILE)
def test_other_bytes_than_announced_are_never_used(site: Site, name: str) -> None:
    site.hub.damage[name] = 1000
    said = site.resolve()
    assert said["kind"] == "ModelError"
    kind = "SHA-256" if name == WEIGHTS else "git id"
    assert f"{name}" in said["error"] and f"twice with another {kind}" in said["error"]
    assert "check whether a proxy changes downloads" in said["error"]
    for half in ("org/tiny", f"org/tiny@{COMMIT}"):
        assert "error" in site.resolve(half, HF_HUB_OFFLINE="1")
    site.hub.damage.clear()
    assert (Path(site.resolve()["folder"]) / name).read_bytes() == (site.model / name).read_bytes()


def test_a_damaged_file_that_another_program_left_is_fetched_again(site: Site) -> None:
    folder = Path(site.resolve()["folder"])
    (folder / "tokenizer.json").resolve().write_bytes(b"{}")
    site.resolve()
    assert (folder / "tokenizer.json").read_bytes() == (site.model / "tokenizer.json").read_bytes()
