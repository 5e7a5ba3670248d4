"""Discovery between machines: three network namespaces on a bridge, real multicast."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.discovery_roles import facts_of
from tests.integration.netns import Lan, lan, require_lan

pytestmark = pytest.mark.root

_WAIT_S = 20.0


class _Role:
    """One process of discovery_roles on one machine, and what it has said."""

    def __init__(self, box: Lan, machine: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.integration.discovery_roles", *arguments]
        self.process = box.popen(machine, command, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            self._lines.put(json.loads(line))

    def wait_for(self, **fields: object) -> dict[str, Any]:
        """The next thing said that has these fields; what comes before is dropped."""
        until = time.monotonic() + _WAIT_S
        while True:
            try:
                said = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"nothing like {fields} within {_WAIT_S:.0f} s") from None
            if fields.items() <= said.items():
                return said


@pytest.fixture(scope="module")
def box() -> Iterator[Lan]:
    require_lan()
    with lan("mini", "studio", "desk") as made:
        yield made


@pytest.fixture(scope="module")
def roles(box: Lan) -> dict[str, _Role]:
    """Two nodes advertise; a third machine browses."""
    made = {
        "mini": _Role(box, "mini", "advertise", "mini", "home", "7001"),
        "studio": _Role(box, "studio", "advertise", "studio", "home", "7002"),
        "desk": _Role(box, "desk", "browse", "home"),
    }
    for role in made.values():
        role.wait_for(event="started")
    return made


def test_a_third_machine_sees_both_nodes_where_they_listen_and_a_sigterm_withdraws_one_at_once(
    box: Lan, roles: dict[str, _Role]
) -> None:
    seen = {}
    while seen.keys() != {"mini", "studio"}:
        said = roles["desk"].wait_for(event="seen")
        seen[said["name"]] = said["addresses"]
    for name, port in (("mini", 7001), ("studio", 7002)):
        assert seen[name][0] == f"{box.address(name)}:{port}"
        assert f"[{box.address6(name)}]:{port}" in seen[name]

    asked_s = time.monotonic()
    roles["mini"].process.send_signal(signal.SIGTERM)
    gone = roles["desk"].wait_for(event="gone")
    assert gone["id"] == facts_of("mini").id
    assert gone["at_s"] - asked_s < 1.0
    assert roles["mini"].process.wait(timeout=5) == 0


def test_a_hidden_folder_is_empty_on_the_machine_and_untouched_outside(box: Lan, tmp_path: Any) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("here")
    command = ["ls", "-A", str(tmp_path / "model")]
    process = box.popen("desk", command, hidden=[tmp_path / "model"], stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=10)[0] == ""
    assert (tmp_path / "model" / "weights").read_text() == "here"


def test_a_machine_may_have_an_id_of_its_own(box: Lan) -> None:
    command = ["cat", "/etc/machine-id"]
    process = box.popen("desk", command, machine_id="c" * 32, stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=10)[0].strip() == "c" * 32
