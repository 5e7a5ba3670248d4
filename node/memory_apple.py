"""The budget of a node that computes on an Apple GPU, which shares one memory with the rest of the machine.

Free memory means nothing there: macOS fills it with caches and compresses what it must. What counts is how much
Metal may wire down, less what the person at the machine needs.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
import sys
from dataclasses import dataclass
from typing import Final

from cluster.errors import UsageError
from cluster.limits import MLX_FREED_BYTES_MAX
from cluster.nodes import MemoryReport, Pressure
from cluster.quantities import GIB, MIB, format_bytes
from cluster.types import Backend
from node.memory_budget import RESERVE_FRACTION_DEFAULT, finish, percent

RESERVE_WITH_PERSON_BYTES: Final = 6 * GIB
"""The least that is kept where someone sits at the screen: window server, browser and an editor."""

_PRESSURE: Final = {2: Pressure.HIGH, 4: Pressure.CRITICAL}
"""macOS's own verdict, kern.memorystatus_vm_pressure_level: 1 normal, 2 warning, 4 critical."""


@dataclass(frozen=True, slots=True)
class AppleFacts:
    """Unified memory as Metal and the kernel describe it."""

    total_bytes: int
    working_set_bytes: int  # Metal's recommended maximum
    wired_limit_bytes: int  # iogpu.wired_limit_mb as set by the owner; 0 when not set
    someone_at_screen: bool
    pressure_level: int
    freed_bytes: int = 0  # what the engine may keep of buffers that it has freed


def apple_report(
    facts: AppleFacts, *, used_bytes: int, cap_bytes: int | None, reserve_fraction: float | None
) -> MemoryReport:
    """What Metal may wire, less the reserve. An explicit `--reserve` is taken at its word, without the floor."""
    limit = facts.wired_limit_bytes or facts.working_set_bytes
    source = "iogpu.wired_limit_mb" if facts.wired_limit_bytes else "Metal's recommendation"
    if reserve_fraction is None:
        reserve = int(facts.total_bytes * RESERVE_FRACTION_DEFAULT)
        if facts.someone_at_screen:
            reserve = max(reserve, RESERVE_WITH_PERSON_BYTES)
        kept = f"{format_bytes(reserve)} kept for the person at the machine (--reserve changes it)"
    else:
        reserve = int(facts.total_bytes * reserve_fraction)
        kept = f"{percent(reserve_fraction)} kept back by --reserve"
    budget = min(limit, facts.total_bytes) - reserve - facts.freed_bytes
    return finish(
        total_bytes=facts.total_bytes,
        reserve_bytes=facts.total_bytes - budget,
        budget_bytes=budget,
        host_budget_bytes=budget,
        used_bytes=used_bytes,
        cap_bytes=cap_bytes,
        pressure=_PRESSURE.get(facts.pressure_level, Pressure.NORMAL),
        facts=[
            f"{format_bytes(facts.total_bytes)} unified memory",
            f"the GPU may use {format_bytes(limit)} by {source}",
            kept,
        ],
    )


def read_apple(backend: Backend) -> AppleFacts:
    """Measure this Mac."""
    return AppleFacts(
        total_bytes=_sysctl("hw.memsize") or 0,
        working_set_bytes=_working_set_bytes(backend),
        wired_limit_bytes=(_sysctl("iogpu.wired_limit_mb") or 0) * MIB,
        someone_at_screen=_someone_at_screen(),
        pressure_level=_sysctl("kern.memorystatus_vm_pressure_level") or 1,
        freed_bytes=MLX_FREED_BYTES_MAX if backend is Backend.MLX else 0,
    )


@functools.cache
def _working_set_bytes(backend: Backend) -> int:
    """Metal's recommendedMaxWorkingSetSize, asked through the engine's library. It never changes while we run."""
    if backend is Backend.MLX:
        import mlx.core

        return int(mlx.core.device_info()["max_recommended_working_set_size"])
    import torch

    if not torch.backends.mps.is_available():
        raise UsageError("this torch cannot use the GPU of this Mac; install potluck[mlx], or pass --device cpu")
    return int(torch.mps.recommended_max_memory())


def _someone_at_screen() -> bool:
    """Whoever is logged in at the screen owns the console; without anyone it belongs to root. A Mac that serves
    over the network alone has nobody there, whether or not a display is plugged in."""
    try:
        return os.stat("/dev/console").st_uid != 0
    except OSError:
        return True


def chip_name() -> str:
    """`Apple M4 Max`; empty where the kernel does not say."""
    return _sysctl_bytes("machdep.cpu.brand_string").rstrip(b"\0").decode(errors="replace")


def _sysctl(name: str) -> int | None:
    """A kernel number of either width; None where there is none of this name."""
    return int.from_bytes(found, sys.byteorder) if (found := _sysctl_bytes(name)) else None


def _sysctl_bytes(name: str) -> bytes:
    """Asked in process: heartbeats are too frequent to start a command for each."""
    call = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "sysctlbyname", None)
    value = ctypes.create_string_buffer(256)
    size = ctypes.c_size_t(len(value))
    if call is None or call(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return b""
    return value.raw[: size.value]
