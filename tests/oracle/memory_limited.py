"""Runs a stage under everything that its plan promises, in a control group that it enters just before the load.

Usage: memory_limited.py BACKEND PROCS WARM_UP_CHECKPOINT CHECKPOINT CONTEXT USERS. What the process took before stays
with the group that it came from: so the limit of the group of PROCS is for the stage alone. Prints its peaks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.types import Backend, LayerRange
from tests.oracle.memory_peaks import Run, peaks, settle


def whole(folder: str, context: int, users: int) -> Run:
    layer_count = read_facts(open_checkpoint(Path(folder))).layer_count
    return Run(Path(folder), LayerRange(0, layer_count), context, users)


def main() -> None:
    backend, procs, warm, folder = Backend(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5]
    peaks(backend, whole(warm, 64, 2))
    settle()
    procs.write_text(str(os.getpid()))
    found = peaks(backend, whole(folder, *map(int, sys.argv[5:7])))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
