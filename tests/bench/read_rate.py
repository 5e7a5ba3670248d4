"""How fast one core reads memory: the floor under every product at one row."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np

from tests.bench.cores import node_core, pinned

_BYTES = 512 << 20  # twice what any cache of today holds
_ROUNDS = 10


def read_bytes_s() -> float:
    """Bytes a second, read once from end to end by a process on a node's core."""
    command = [*pinned([node_core(0)]), sys.executable, "-m", "tests.bench.read_rate"]
    return float(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


def main() -> None:
    numbers = np.ones(_BYTES // 4, dtype=np.float32)
    best_s = float("inf")
    for _ in range(_ROUNDS):
        began_s = time.perf_counter()
        numbers.max()  # of numpy's reductions the one that waits for memory most
        best_s = min(best_s, time.perf_counter() - began_s)
    sys.stdout.write(f"{_BYTES / best_s}\n")


if __name__ == "__main__":
    main()
