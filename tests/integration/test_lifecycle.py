"""Starting, stopping and dying: leases, signals, and nodes that vanish. Limits are three times what is promised."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("torch", reason="the checkpoint is made with transformers: the extra [torch]")

from cluster.cli.child import Process
from cluster.cli.serve import potluck_command
from cluster.discovery import Browser, NodeSighting
from cluster.interfaces import choose_interfaces, read_interfaces
from tests.integration.answers import Served
from tests.integration.fragile import Fragile
from tests.integration.live import (
    NODES,
    START_S,
    Coordinator,
    Pool,
    eventually,
    happenings,
    has_backend,
    joined,
    new_cluster,
    processes_of,
    serving,
)

STOP_S = 10.0
KILLED_LEASE_S = 3 * 12.0
"""A killed coordinator's lease ends after 10 s, and nodes are asked again every second."""

GIVEN_BACK_S = 9.0
"""One that stops gives its nodes back, so that nobody waits 10 s for the lease to run out."""


def _send(process: Process, number: signal.Signals) -> None:
    os.kill(process.pid, number)


def _ended(process: Process, timeout_s: float) -> int:
    """Its exit code, once it has ended by itself."""
    eventually(lambda: process.exit_code is not None, f"{process.name} has ended", timeout_s)
    assert process.exit_code is not None
    return process.exit_code


def _long_stream(coordinator: Coordinator, served: Served) -> contextlib.AbstractContextManager[httpx.Response]:
    body = {"prompt": list(served.asked.prompt), "max_tokens": 900, "temperature": 0, "ignore_eos": True}
    return httpx.stream("POST", f"{coordinator.url}/v1/completions", json={**body, "stream": True}, timeout=60.0)


# -- Leases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_leased_node_is_refused_to_others_until_its_coordinator_ends(
    how: signal.Signals, pool: Pool, served: Served, tmp_path: Path
) -> None:
    """The second coordinator says who is in its way and what it waits for, and serves once the first has ended."""
    with pool.serving(served.folder, ["torch-a"]) as first:
        others = [word for name in NODES if name != "torch-a" for word in ("--exclude", name)]
        peers = [] if pool.mdns else ["--no-mdns", "--peer", pool.addresses["torch-a"]]
        wanted = ["--no-local-node", *others, *peers]
        with serving(served.folder, pool.cluster, tmp_path, *wanted) as second:
            reason = "excluded"
            while "excluded" in reason:
                reason = str(second.process.wait_for("node_turned_away", START_S)["reason"])
            assert "serves coordinator" in reason and "stop that one" in reason
            assert reason in [away["reason"] for away in second.status()["turned_away"]]
            ready = second.get("/ready")
            assert ready.status_code == 503
            assert "waiting for one more node" in ready.json()["reason"]
            assert first.is_unharmed(served.asked.prompt, served.asked.ids)

            _send(first.process, how)
            _ended(first.process, 3 * STOP_S)
            second.wait_ready(KILLED_LEASE_S if how is signal.SIGKILL else GIVEN_BACK_S)
            assert second.is_unharmed(served.asked.prompt, served.asked.ids)
            holders = [happenings(one.process, "listening")[0]["coordinator"] for one in (first, second)]
            screen = pool.processes["torch-a"]
            taken = [
                holder.startswith(said["coordinator"])
                for said in happenings(screen, "taken")[-2:]
                for holder in holders
            ]
            assert taken == [True, False, False, True], "the node says whom it serves"
            layers = [0, second.status()["model"]["layers"]]
            assert happenings(screen, "free") and happenings(screen, "at_work")[-1]["layers"] == layers


# -- Stopping --------------------------------------------------------------------------------------------


def test_sigterm_of_serve_ends_everything_even_while_it_answers(served: Served, tmp_path: Path) -> None:
    cluster = new_cluster()
    with serving(served.folder, cluster, tmp_path, "--no-mdns") as coordinator:
        coordinator.wait_ready()
        assert len(processes_of(cluster)) == 2, "the coordinator and the node on this machine"
        with _long_stream(coordinator, served) as response:
            lines = response.iter_lines()
            next(lines)
            _send(coordinator.process, signal.SIGTERM)
            with contextlib.suppress(httpx.HTTPError):
                list(lines)
        assert _ended(coordinator.process, 3 * STOP_S) == 0
        assert not processes_of(cluster)


def test_the_node_on_this_machine_is_restarted_when_killed_and_ends_with_a_killed_serve(
    served: Served, tmp_path: Path
) -> None:
    cluster = new_cluster()
    with serving(served.folder, cluster, tmp_path, "--no-mdns") as coordinator:
        coordinator.wait_ready()
        (node,) = [process for process in processes_of(cluster) if process.pid != coordinator.process.pid]
        node.kill()
        coordinator.wait_ready()
        assert coordinator.is_unharmed(served.asked.prompt, served.asked.ids)

        _send(coordinator.process, signal.SIGKILL)
        eventually(lambda: not processes_of(cluster), "the node on this machine has ended", 3 * STOP_S)


def test_a_second_node_on_one_state_is_told_which_option_to_use(pool: Pool) -> None:
    pool.need("torch-a")
    command = ["join", "--state", str(pool.folder / "torch-a"), "--backend", "torch", "--cluster", pool.cluster]
    second = subprocess.run(potluck_command(*command), capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 2
    assert "--state" in second.stderr
    assert str(pool.processes["torch-a"].pid) in second.stderr
    assert "Traceback" not in second.stderr


def test_sigterm_of_join_withdraws_its_advertisement(tmp_path: Path, mdns: bool) -> None:
    if not mdns:
        pytest.skip("multicast does not work on this machine's loopback interface")
    cluster = new_cluster()
    backend = "mlx" if has_backend("mlx") else "torch"

    async def test(node: Process) -> None:
        nodes: dict[str, NodeSighting] = {}
        loopback = choose_interfaces(read_interfaces(), "127.0.0.1")
        browser = Browser(cluster, lambda seen: nodes.update({seen.id: seen}), nodes.pop, interfaces=loopback)
        await browser.start()
        try:
            await _until(lambda: bool(nodes), START_S)
            _send(node, signal.SIGTERM)
            await _until(lambda: not nodes, STOP_S)
        finally:
            await browser.stop()

    with joined("leaver", backend, cluster, tmp_path) as node:
        node.wait_for("up", START_S)
        asyncio.run(test(node))
        assert _ended(node, 3 * STOP_S) == 0
    assert not processes_of(cluster)


async def _until(condition: object, timeout_s: float) -> None:
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the test has nothing else to do
            await asyncio.sleep(0.05)


# -- Nodes that vanish -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fragile(served: Served, mdns: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fragile]:
    folder = tmp_path_factory.mktemp("fragile")
    with contextlib.ExitStack() as stack:
        made = Fragile(folder, mdns, stack)
        made.serve(served.folder, "--min-nodes", "2", "--grace", "1")
        for name in ("torch", "mlx"):
            made.start(name)
        yield made
    assert not processes_of(made.cluster)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=lambda number: number.name)
def test_a_node_lost_while_it_answers_ends_the_stream_with_an_error(
    stage: int, how: signal.Signals, fragile: Fragile, served: Served
) -> None:
    """Killed or frozen, first stage or last: the stream never hangs."""
    coordinator = fragile.whole()
    node = fragile.node_of(stage)
    try:
        with _long_stream(coordinator, served) as response:
            lines = response.iter_lines()
            for _ in range(4):
                next(lines)
            _send(node, how)
            began = time.monotonic()
            rest = [line for line in lines if line]
        assert time.monotonic() - began < 15.0
        assert rest[-1].startswith('data: {"error"'), rest[-1]
    finally:
        if how is signal.SIGSTOP:
            _send(node, signal.SIGCONT)
    assert fragile.whole().is_unharmed(served.asked.prompt, served.asked.ids)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_node_killed_while_idle_is_noticed_and_its_return_heals(stage: int, fragile: Fragile, served: Served) -> None:
    coordinator = fragile.whole()
    _send(fragile.node_of(stage), signal.SIGKILL)
    began = time.monotonic()
    unready = eventually(
        lambda: (answer := coordinator.get("/ready")).status_code == 503 and answer, "/ready says no", 3 * 10.0
    )
    assert unready.json()["reason"]
    eventually(lambda: "one more node" in coordinator.get("/ready").json()["reason"], "it says what it waits for")
    assert coordinator.get("/health").status_code == 200
    refused = coordinator.post("/v1/completions", {"prompt": [9, 9], "max_tokens": 1})
    assert refused.status_code == 503
    assert time.monotonic() - began < 3 * 10.0
    assert fragile.whole().is_unharmed(served.asked.prompt, served.asked.ids)
