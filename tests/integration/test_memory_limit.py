"""A stage whose plan fills a control group to its limit loads, computes what the plan promises, and lives; so does a
node that people have joined."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.placement import StageCost, stage_cost
from cluster.quantities import MIB
from cluster.types import Backend, LayerRange
from tests.checkpoints import make_checkpoint
from tests.integration.control_groups import limited_group
from tests.integration.live import START_S, has_backend, joined, new_cluster, serving
from tests.oracle.memory_edges import LIBRARY_BYTES

pytestmark = pytest.mark.root

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 8000}
LAYERS = 8

USERS = 2
CONTEXTS = {Backend.TORCH: 2048, Backend.MLX: 192}
"""MLX multiplies slowly on a processor."""

NODE_BYTES = 32 * MIB
"""Beside its stage a node that is up takes this much more: threads, streams and buffers of the steps' frames, weights
on their way to its disk, tokens to draw from. Nodes leave it to their reserve."""

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path / "model", layers=LAYERS, **SIZES)


def planned(folder: Path, backend: Backend, context: int) -> StageCost:
    """Of the whole model in one stage. Skips where this installation has not the engine."""
    if not has_backend(backend):
        pytest.skip(f"the engine {backend} is not installed")
    facts = read_facts(open_checkpoint(folder))
    return stage_cost(facts, LayerRange(0, LAYERS), backend, context=context, users=USERS, on_cpu=True)


@pytest.mark.parametrize(("backend", "context"), CONTEXTS.items())
def test_a_plan_at_the_edge_lives_within_its_limit(
    backend: Backend, context: int, folder: Path, tmp_path: Path
) -> None:
    cost = planned(folder, backend, context)
    warm = make_checkpoint("llama", tmp_path / "warm")

    def within(limit_bytes: int) -> subprocess.CompletedProcess[str]:
        with limited_group(limit_bytes) as group:
            arguments = [backend.value, group / "cgroup.procs", warm, folder, context, USERS]
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


@pytest.mark.parametrize(("backend", "context"), CONTEXTS.items())
def test_a_node_that_has_joined_lives_within_what_its_plan_said(
    backend: Backend, context: int, folder: Path, tmp_path: Path
) -> None:
    """What it took to come up stays with the group that it came from; from then on a real limit holds."""
    cost, cluster = planned(folder, backend, context), new_cluster()
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(limited_group(cost.memory_bytes + LIBRARY_BYTES + NODE_BYTES))
        memory = f"{cost.memory_bytes // MIB + 1}MiB"
        node = stack.enter_context(joined("limited", backend, cluster, tmp_path / "node", "--no-mdns", memory=memory))
        peer = str(node.wait_for("up", START_S)["addresses"][0])
        (group / "cgroup.procs").write_text(str(node.pid))
        wanted = ("--no-local-node", "--no-mdns", "--peer", peer)
        coordinator = stack.enter_context(
            serving(folder, cluster, tmp_path / "coordinator", *wanted, context=context, users=USERS)
        ).wait_ready()
        prompts = [[20 + user] * (context - 2) for user in range(USERS)]
        with ThreadPoolExecutor(USERS) as pool:
            answers = list(pool.map(lambda prompt: coordinator.complete(prompt, max_tokens=2), prompts))
        assert [len(answer["token_ids"]) for answer in answers] == [2] * USERS
        (stage,) = coordinator.status()["plan"]["stages"]
        assert stage["weight_bytes"] + stage["kv_bytes"] + stage["workspace_bytes"] == cost.memory_bytes
        assert node.exit_code is None, node.output()
