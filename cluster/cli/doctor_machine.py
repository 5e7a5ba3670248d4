"""Doctor's checks of this machine's own means: the state folder, room on its disk, memory for a node."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cluster.cli.check import Check, Status
from cluster.nodes import MemoryReport, Pressure
from cluster.quantities import GIB, format_bytes
from cluster.state_dir import holder_pid

DISK_WARN_BYTES: Final = 20 * GIB
"""A node's slice of a 70-billion-parameter model in 4 bits, shared by two, takes about this much."""

DISK_FAIL_BYTES: Final = 1 * GIB


def check_state(path: Path, holders: Mapping[Path, int]) -> Check:
    """Whether the state folder can be written, and which processes hold parts of it."""
    place = _existing(path)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        owner = "cannot be written by this user" if place.is_dir() else "is not a folder"
        return Check("state folder", Status.FAIL, f"{place} {owner}", "choose another with --state DIR or POTLUCK_HOME")
    if holders:
        held = ", ".join(f"{folder} by process {pid or '?'}" for folder, pid in holders.items())
        return Check(
            "state folder", Status.WARN, f"in use: {held}", "for a second node here, give it its own --state DIR"
        )
    return Check("state folder", Status.OK, str(path) if path.exists() else f"{path} (will be made)")


def find_holders(path: Path) -> dict[Path, int]:
    """The parts of a state folder that running processes hold: itself, and what lies up to two levels below."""
    locks = [path / "lock", *path.glob("*/lock"), *path.glob("*/*/lock")]
    pids = {lock.parent: holder_pid(lock.parent) for lock in locks if lock.is_file()}
    return {folder: pid for folder, pid in pids.items() if pid is not None}


def check_disk(path: Path, free_bytes: int | None = None) -> Check:
    """Room for weights that arrive from the coordinator or the hub."""
    free = shutil.disk_usage(_existing(path)).free if free_bytes is None else free_bytes
    found = f"{format_bytes(free)} free for {path}"
    if free < DISK_FAIL_BYTES:
        return Check("disk", Status.FAIL, found, "free some room, or point --state at a larger disk")
    if free < DISK_WARN_BYTES:
        return Check("disk", Status.WARN, found, "large models need more: free some, or point --state at a larger disk")
    return Check("disk", Status.OK, found)


def check_memory(label: str, report: MemoryReport) -> Check:
    """What a node on one device could hold."""
    found = f"{format_bytes(report.budget_bytes)} for a node: {report.explained}"
    if report.budget_bytes == 0:
        return Check(label, Status.WARN, found, "close programs, or keep less back with `potluck join --reserve`")
    if report.pressure is not Pressure.NORMAL:
        return Check(label, Status.WARN, f"{found}; pressure is {report.pressure.value}", "close programs")
    return Check(label, Status.OK, found)


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))
