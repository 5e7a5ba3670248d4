"""A stage whose plan fills a control group to its limit loads, computes what the plan promises, and lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.placement import stage_cost
from cluster.quantities import MIB
from cluster.types import Backend, LayerRange
from tests.checkpoints import make_checkpoint
from tests.integration.control_groups import limited_group
from tests.oracle.memory_edges import LIBRARY_BYTES

pytestmark = pytest.mark.root

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 8000}
LAYERS = 8

SIGKILL = -9


@pytest.fixture(autouse=True)
def needs_groups() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("control groups need Linux and root")
    try:
        with limited_group(MIB):
            pass
    except OSError as error:
        pytest.skip(f"no memory group can be made: {error}")


def test_a_plan_at_the_edge_lives_within_its_limit(tmp_path: Path) -> None:
    backend, context, users = Backend.TORCH, 2048, 2
    warm = make_checkpoint("llama", tmp_path / "warm")
    folder = make_checkpoint("llama", tmp_path / "model", layers=LAYERS, **SIZES)
    facts = read_facts(open_checkpoint(folder))
    cost = stage_cost(facts, LayerRange(0, LAYERS), backend, context=context, users=users)

    def within(limit_bytes: int) -> subprocess.CompletedProcess[str]:
        with limited_group(limit_bytes) as group:
            arguments = [backend.value, group / "cgroup.procs", warm, folder, context, users]
            return subprocess.run(
                [sys.executable, "-m", "tests.oracle.memory_limited", *map(str, arguments)],
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )

    done = within(cost.memory_bytes + LIBRARY_BYTES)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert json.loads(done.stdout)["peak"] >= 0.85 * cost.memory_bytes
    # The limit is a real one: with a quarter less the same stage is killed.
    assert within(3 * cost.memory_bytes // 4).returncode == SIGKILL
