"""Loads the first eight layers of a checkpoint in a process of its own.

Prints by how many bytes the peak of memory grew, and how many the slice has.
Usage: peak_memory.py CHECKPOINT WARM_UP_CHECKPOINT. The second one is loaded first: libraries that are imported
and buffers that are made once are no part of a load.
"""

from __future__ import annotations

import sys
from pathlib import Path

from node.engines.torch.engine import TorchEngine
from tests.oracle.pipelines import stage_specs


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def load(folder: Path, cut: int) -> TorchEngine:
    engine = TorchEngine()
    engine.load(stage_specs(folder, (cut,))[0], lambda progress: None)
    return engine


def main() -> None:
    large, warm = map(Path, sys.argv[1:])
    load(warm, 3).close()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    before_bytes = peak_bytes()
    engine = load(large, 8)
    sys.stdout.write(f"{peak_bytes() - before_bytes} {engine.capacity().weight_bytes}\n")


if __name__ == "__main__":
    main()
