"""`potluck verify --url`: what a running cluster has planned is what is verified."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the reference needs the extra [torch]")

from cluster.cli.serve import potluck_command
from tests.integration.answers import Served
from tests.integration.live import Coordinator


def test_the_plan_of_a_running_cluster_is_verified_stage_by_stage(
    mixed: Coordinator, served: Served, tmp_path: Path
) -> None:
    """No MODEL is named: the status says which folder it is."""
    planned = mixed.status()["plan"]["stages"]
    command = potluck_command("verify", "--url", mixed.url, "--tokens", "24", "--json", "--state", str(tmp_path))
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for fields in ("backend", "first_layer", "last_layer"):
        assert [stage[fields] for stage in found["stages"]] == [stage[fields] for stage in planned]
    assert found["ok"]
    assert found["model"] == served.folder.name
