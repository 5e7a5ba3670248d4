"""Loads the first eight layers of a checkpoint in a process of its own.

Prints by how many bytes the peak of memory grew, and how many the slice has.
Usage: peak_memory.py CHECKPOINT WARM_UP_CHECKPOINT [BACKEND BITS]; torch, as stored, unless told. The second checkpoint
is loaded first: libraries that are imported and buffers that are made once are no part of a load.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.types import Backend
from node.engine import Engine
from node.engines.registry import create_engine
from tests.oracle.pipelines import stage_specs


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def load(folder: Path, cut: int, backend: Backend, bits: int | None) -> Engine:
    engine = create_engine(backend)
    engine.load(stage_specs(folder, (cut,), bits=bits)[0], lambda progress: None)
    return engine


def main() -> None:
    large, warm = map(Path, sys.argv[1:3])
    backend, bits = (Backend(sys.argv[3]), int(sys.argv[4])) if len(sys.argv) > 3 else (Backend.TORCH, None)
    load(warm, 3, backend, bits).close()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    before_bytes = peak_bytes()
    engine = load(large, 8, backend, bits)
    sys.stdout.write(f"{peak_bytes() - before_bytes} {engine.capacity().weight_bytes}\n")


if __name__ == "__main__":
    main()
