"""How many tokens a second the coordinator and its end of the wire can serve: a real HTTP server, scheduler and
pipeline in front of a stage that answers at once.

What is compared is the coordinator's processor time, which other work on the machine moves little.
`python -m tests.bench.coordinator_rate [SECONDS]` prints it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tests.bench.roles import Cluster, instant_cluster
from tests.bench.streams import Streams

_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Rate:
    """What a coordinator did for `streams` clients that read as fast as they can."""

    streams: int
    events: int  # tokens that arrived at the clients
    wall_s: float
    cpu_s: float  # of the coordinator's process, all threads

    @property
    def events_per_cpu_s(self) -> float:
        return self.events / self.cpu_s

    @property
    def cpu_us_per_event(self) -> float:
        return self.cpu_s / self.events * 1e6

    @property
    def events_per_s(self) -> float:
        return self.events / self.wall_s


def measure(cluster: Cluster, *, streams: int, seconds: float) -> Rate:
    """Let `streams` clients read for `seconds`, once all of them have begun."""
    coordinator = cluster.coordinator
    with Streams(coordinator.port, streams) as clients:
        clients.read_for(_SETTLE_S)
        cpu_s, began_s, events = coordinator.cpu_s, time.perf_counter(), clients.events
        clients.read_for(seconds)
        wall_s = time.perf_counter() - began_s
        return Rate(streams, clients.events - events, wall_s, coordinator.cpu_s - cpu_s)


def main(seconds: float) -> None:
    for in_flight in (1, 2):
        with instant_cluster(in_flight=in_flight) as cluster:
            for streams in (1, 64):
                rate = measure(cluster, streams=streams, seconds=seconds)
                print(  # noqa: T201 - a table for the person who asked
                    f"{in_flight} in flight, {streams:2d} streams: {rate.cpu_us_per_event:6.1f} us of CPU an event, "
                    f"{rate.events_per_cpu_s:7.0f} events a CPU second, {rate.events_per_s:7.0f} a second"
                )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
