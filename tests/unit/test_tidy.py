"""Taste as a test: the map is complete, files fit in the head, and banned calls name their replacement."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cluster", "node", "coordinator")
LINES_MAX = 300
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name)
BANNED = {
    r"\bpickle\b": "values travel as msgpack or protobuf",
    r"torch\.load\(": "weights come from safetensors",
    r"trust_remote_code\s*=\s*True": "no model brings code",
    r"yaml\.load\(": "yaml.safe_load",
    r"time\.time\(\)(?!\))": "time.monotonic() for durations; wall time only where a date is shown",
    r"os\.system\(|shell\s*=\s*True": "subprocess with a list",
    r"grpc(\.aio)?\.(insecure|secure)_channel": "cluster.transport.Credentials",
    r"asyncio\.get_event_loop\(": "asyncio.get_running_loop()",
}
ALLOWED = {"cluster/transport.py": r"grpc(\.aio)?\.(insecure|secure)_channel"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_fits_in_the_head_and_says_what_it_owns(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LINES_MAX, "look for the second idea in it"
    assert text.startswith('"""'), "a module begins by saying what it owns"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_banned_calls_have_a_replacement(path: Path) -> None:
    for pattern, instead in BANNED.items():
        if ALLOWED.get(name(path)) != pattern:
            assert not re.search(pattern, path.read_text()), f"use {instead}"


def test_the_map_names_every_module_and_nothing_else() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    mapped: set[str] = set()
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        package = section.partition("/")[0]
        for line in section.splitlines():
            if not line.startswith("| `"):
                continue
            folder = ""
            for entry in re.findall(r"`([\w/.]+)`", line.split("|")[1]):
                folder = entry.rpartition("/")[0] + "/" if "/" in entry else folder
                mapped.add(f"{package}/{entry if '/' in entry else folder + entry}")
    modules = {name(path) for path in SOURCES if path.name != "__init__.py"}
    assert modules - mapped == set(), "not in ARCHITECTURE.md"
    assert {entry for entry in mapped if entry.endswith(".py")} - modules == set(), "in ARCHITECTURE.md, but gone"


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "helpers", "common", "misc", "base", "util"}
    assert not [name(path) for path in SOURCES if path.stem in drawers]
