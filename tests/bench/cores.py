"""Who computes where: one core for each node, the same cores for coordinators and the client in every arm."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from cluster.errors import UsageError


def machine_cores() -> tuple[int, ...]:
    """The cores that this process may use, as it was started."""
    return _CORES


def node_core(index: int) -> int:
    return _CORES[index]


def client_cores() -> tuple[int, ...]:
    """Cores that no node has, where there are two of them; else all, so that the kernel moves coordinator and client
    to whichever core is idle."""
    spare = _CORES[NODES_MAX:]
    return spare if len(spare) >= 2 else _CORES


def pinned(cores: Sequence[int]) -> tuple[str, ...]:
    """The words before a command that keep it, and what it starts, on these cores."""
    return ("taskset", "--cpu-list", ",".join(map(str, cores)))


def check() -> None:
    """Raises UsageError where the table cannot be measured."""
    if not hasattr(os, "sched_setaffinity") or shutil.which("taskset") is None:
        raise UsageError("the table pins processes to cores with taskset, which this system does not have")
    if len(_CORES) < NODES_MAX:
        raise UsageError(f"the table needs {NODES_MAX} cores, one for each node; found {len(_CORES)}")


NODES_MAX = 2
_CORES: tuple[int, ...] = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
