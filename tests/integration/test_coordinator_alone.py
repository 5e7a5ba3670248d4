"""A real coordinator process before stages that compute nothing: what it promises, and what clients cannot do to it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import psutil
import pytest

from cluster.quantities import MIB
from tests.bench import coordinator_rate, hop_time
from tests.bench.roles import Cluster, instant_cluster
from tests.bench.streams import Streams, ask
from tests.integration.live import eventually

SLACK = 3.0
"""How far a promise about time may be missed here. Processor time is compared, never wall time: a machine of half the
speed needs twice of it, but one that is busy with other things hardly more."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with instant_cluster() as started:
        yield started


def test_one_core_serves_ten_thousand_tokens_a_second_to_64_streams(cluster: Cluster) -> None:
    rate = coordinator_rate.measure(cluster, streams=64, seconds=3.0)
    assert rate.events > 1000
    assert rate.events_per_cpu_s > 10_000 / SLACK


def test_a_hop_takes_half_a_millisecond() -> None:
    """Of all processes together, so this includes what they do beside waiting for each other."""
    found = hop_time.measure(2, seconds=3.0)
    assert (found.coordinator_s + found.stage_s - found.compute_s) / 3 < 0.5e-3 * SLACK


def test_clients_that_read_nothing_are_given_up_and_hold_up_nobody(cluster: Cluster) -> None:
    """Their connections stay open all the time."""
    process = psutil.Process(cluster.coordinator.pid)
    with Streams(cluster.coordinator.port, 1) as reader:
        reader.read_for(1.0)
        before = process.memory_info().rss
        silent = [ask(cluster.coordinator.port, receive_buffer_bytes=4096) for _ in range(8)]
        running: list[int] = []

        def only_the_reader_is_left() -> bool:
            seen = reader.events
            reader.read_for(1.0)
            assert reader.events > seen, "the one that reads was held up"
            running.append(cluster.status()["load"][1])
            return max(running) > 1 and running[-1] == 1

        # Long before the answers end by themselves, which the reader's does first.
        eventually(only_the_reader_is_left, "the silent ones' sequences have ended", timeout_s=240.0)
        assert process.memory_info().rss - before < 8 * (16 * MIB)
        assert all(_is_open(connection) for connection in silent)
        for connection in silent:
            connection.close()


def _is_open(connection: socket.socket) -> bool:
    """There is something to read, and it is not the end."""
    return bool(connection.recv(1, socket.MSG_PEEK))
