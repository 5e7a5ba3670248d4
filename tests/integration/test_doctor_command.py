"""`potluck doctor` as a process on this machine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from cluster.cli.doctor_network import port_is_free, port_owner


def test_doctor_examines_this_machine_and_its_exit_code_agrees_with_its_verdict(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli.main", "doctor", "--json", "--state", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    document = json.loads(result.stdout)
    assert result.returncode == (0 if document["ok"] else 1)
    by_name = {check["name"]: check for check in document["checks"]}
    assert {"python", "packages", "our modules", "engines", "gpu", "state folder", "disk"} <= by_name.keys()
    assert {"port of the endpoint", "port for nodes", "interfaces", "multicast", "firewall"} <= by_name.keys()
    assert ("tcp pacing" in by_name) == (sys.platform == "linux")
    assert by_name["python"]["status"] == "ok"
    assert not [check for check in document["checks"] if "broke" in check["found"]]


def test_a_port_in_use_is_seen_with_its_owner() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
        assert (port_owner(port) or "").startswith("process ")
    assert port_is_free("127.0.0.1", port)
