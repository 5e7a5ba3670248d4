"""What a token costs beside computing it: one user, stages that compute nothing, everything between client and engine
included. `python -m tests.bench.hop_time [SECONDS]` prints it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tests.bench.roles import idle_cluster, status
from tests.bench.streams import Streams

_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class HopTime:
    """Means over a run of one stream."""

    stages: int
    token_s: float  # between two tokens at the client
    compute_s: float  # of them in the stages' engine threads: verbs, the idle engine, the draw
    cpu_s: float  # the coordinator's processor time

    @property
    def hop_s(self) -> float:
        """A token crosses into every stage and back to the coordinator."""
        return (self.token_s - self.compute_s) / (self.stages + 1)


def measure(stages: int, *, seconds: float) -> HopTime:
    with idle_cluster(stages) as port, Streams(port, 1) as client:
        client.read_for(_SETTLE_S)
        before, began_s, tokens = status(port), time.perf_counter(), client.events
        client.read_for(seconds)
        wall_s, tokens = time.perf_counter() - began_s, client.events - tokens
        after = status(port)
        return HopTime(
            stages,
            wall_s / tokens,
            (after["compute_s"] - before["compute_s"]) / (after["steps"] - before["steps"]),
            (after["cpu_s"] - before["cpu_s"]) / tokens,
        )


def main(seconds: float) -> None:
    for stages in (1, 2, 3):
        found = measure(stages, seconds=seconds)
        print(  # noqa: T201 - a table for the person who asked
            f"{stages} stages: {found.token_s * 1e6:6.0f} us a token, {found.compute_s * 1e6:4.0f} of them in engine "
            f"threads, {found.hop_s * 1e6:4.0f} a hop; the coordinator's CPU {found.cpu_s * 1e6:4.0f}"
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
