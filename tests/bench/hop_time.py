"""What a token costs beside computing it: one user, stages that compute nothing, everything between client and engine
included. `python -m tests.bench.hop_time [SECONDS]` prints it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tests.bench.roles import Cluster, idle_cluster
from tests.bench.streams import Streams

_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class HopTime:
    """Means over a run of one stream."""

    stages: int
    token_s: float  # between two tokens at the client
    compute_s: float  # of them in the stages' engine threads: verbs, the idle engine, the draw
    coordinator_s: float  # processor time
    stage_s: float  # processor time of all stages together, what they compute included

    @property
    def hop_s(self) -> float:
        """A token crosses into every stage and back to the coordinator."""
        return (self.token_s - self.compute_s) / (self.stages + 1)


def measure(stages: int, *, seconds: float) -> HopTime:
    with idle_cluster(stages) as cluster, Streams(cluster.coordinator.port, 1) as client:
        client.read_for(_SETTLE_S)
        before, tokens, used = cluster.status(), client.events, _cpu_s(cluster)
        began_s = time.perf_counter()
        client.read_for(seconds)
        wall_s, tokens = time.perf_counter() - began_s, client.events - tokens
        after, used_after = cluster.status(), _cpu_s(cluster)
        return HopTime(
            stages,
            wall_s / tokens,
            (after["compute_s"] - before["compute_s"]) / (after["steps"] - before["steps"]),
            (used_after[0] - used[0]) / tokens,
            (used_after[1] - used[1]) / tokens,
        )


def _cpu_s(cluster: Cluster) -> tuple[float, float]:
    return cluster.coordinator.cpu_s, sum(stage.cpu_s for stage in cluster.stages)


def main(seconds: float) -> None:
    for stages in (1, 2, 3):
        found = measure(stages, seconds=seconds)
        print(  # noqa: T201 - a table for the person who asked
            f"{stages} stages: {found.token_s * 1e6:6.0f} us a token, {found.compute_s * 1e6:4.0f} of them in engine "
            f"threads, {found.hop_s * 1e6:4.0f} a hop; CPU: coordinator {found.coordinator_s * 1e6:4.0f}, "
            f"all stages {found.stage_s * 1e6:4.0f}"
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
