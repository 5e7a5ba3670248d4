"""The rules that every kind of memory shares: reserve, cap, pressure, and how a budget explains itself.

Pure. Measuring is done by memory_ram, memory_apple and memory_cuda.
"""

from __future__ import annotations

from typing import Final

from cluster.errors import UsageError
from cluster.nodes import GroupMemory, MemoryReport, Pressure
from cluster.quantities import format_bytes

RESERVE_FRACTION_DEFAULT: Final = 0.15
"""Of all memory, kept for the system and for the person at the machine: what a desktop with a browser takes."""


def finish(
    *,
    total_bytes: int,
    reserve_bytes: int,
    budget_bytes: int,
    host_budget_bytes: int,
    used_bytes: int,
    cap_bytes: int | None,
    pressure: Pressure,
    facts: list[str],
    groups: tuple[GroupMemory, ...] = (),
) -> MemoryReport:
    """Apply `--memory` and write the line that explains the result. A budget is never negative."""
    budget = max(0, budget_bytes)
    if cap_bytes is not None:
        if cap_bytes > total_bytes:
            raise UsageError(
                f"--memory asks for {format_bytes(cap_bytes)}, and there are {format_bytes(total_bytes)}; "
                "name a smaller share, or leave the option out to have it measured"
            )
        budget = min(budget, cap_bytes)
        reserve_bytes = max(reserve_bytes, total_bytes - cap_bytes)
        facts = [*facts, f"at most {format_bytes(cap_bytes)} by --memory"]
    return MemoryReport(
        budget_bytes=budget,
        host_budget_bytes=max(0, host_budget_bytes),
        used_bytes=used_bytes,
        total_bytes=total_bytes,
        pressure=pressure,
        explained=", ".join(facts),
        reserve_bytes=min(reserve_bytes, total_bytes),
        groups=groups,
    )


def pressure_of_free(free_bytes: int, high_below_bytes: int, critical_below_bytes: int) -> Pressure:
    """How close to running out, by what is free now."""
    if free_bytes < critical_below_bytes:
        return Pressure.CRITICAL
    return Pressure.HIGH if free_bytes < high_below_bytes else Pressure.NORMAL


def percent(fraction: float) -> str:
    """`15 %`, `12.5 %`."""
    return f"{fraction * 100:.4g} %"
