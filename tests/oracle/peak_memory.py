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
from tests.oracle.memory_peaks import forget_peak, resident_bytes
from tests.oracle.pipelines import stage_specs


def load(folder: Path, cut: int, backend: Backend, bits: int | None) -> Engine:
    engine = create_engine(backend)
    engine.load(stage_specs(folder, (cut,), bits=bits)[0], lambda progress: None)
    return engine


def main() -> None:
    large, warm = map(Path, sys.argv[1:3])
    backend, bits = (Backend(sys.argv[3]), int(sys.argv[4])) if len(sys.argv) > 3 else (Backend.TORCH, None)
    load(warm, 3, backend, bits).close()
    forget_peak()
    before_bytes, files_bytes = resident_bytes("VmRSS"), resident_bytes("RssFile")
    engine = load(large, 8, backend, bits)
    code_bytes = resident_bytes("RssFile") - files_bytes  # of libraries, which come and go as the kernel likes
    growth_bytes = resident_bytes("VmHWM") - before_bytes - code_bytes
    sys.stdout.write(f"{growth_bytes} {engine.capacity().weight_bytes}\n")


if __name__ == "__main__":
    main()
