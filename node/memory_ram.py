"""The budget of a node that computes in main memory.

The limits of the process's control groups count like the size of the machine, whichever is smallest. Other nodes of the
machine may live in other groups, so what each group and the machine have for all of their nodes is told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from cluster.nodes import GroupMemory, MemoryReport
from cluster.quantities import format_bytes
from node.memory_budget import RESERVE_FRACTION_DEFAULT, finish, percent, pressure_of_free
from node.memory_cgroup import CgroupMemory, read_cgroups

_HIGH_FRACTION: Final = 0.10
_CRITICAL_FRACTION: Final = 0.05
"""Of all memory, still available. A full budget leaves the reserve of 15 %, so a plan alone never raises these."""


@dataclass(frozen=True, slots=True)
class RamFacts:
    """Main memory as the kernel counts it."""

    total_bytes: int
    available_bytes: int
    cgroups: tuple[CgroupMemory, ...] = ()  # the outermost first


def read_ram(root: Path = Path("/")) -> RamFacts:
    """Measure this machine."""
    memory = psutil.virtual_memory()
    return RamFacts(memory.total, memory.available, read_cgroups(root))


def process_bytes() -> int:
    """Memory that would come free if this process ended: resident, less the files that it shares with the cache."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def ram_report(
    facts: RamFacts, *, used_bytes: int, cap_bytes: int | None, reserve_fraction: float | None
) -> MemoryReport:
    """What is available, plus what this node already uses, less the reserve."""
    total, available = facts.total_bytes, facts.available_bytes
    explained = [f"{format_bytes(total)} RAM"]
    if (limit := min((group.limit_bytes for group in facts.cgroups), default=total)) < total:
        total = limit
        explained.append(f"limited to {format_bytes(total)} by its control group")
    available = min([available, *(group.available_bytes for group in facts.cgroups)])
    fraction = RESERVE_FRACTION_DEFAULT if reserve_fraction is None else reserve_fraction
    reserve = int(total * fraction)
    budget = min(total, available + used_bytes) - reserve

    def for_all(size_bytes: int, left_bytes: int) -> int:
        """What nodes may hold together in the machine or a group. Its reserve is kept from their sum alone: a node by
        itself keeps back no more than that of the smallest."""
        return max(budget, min(size_bytes, left_bytes + used_bytes) - int(size_bytes * fraction))

    explained.append(f"{format_bytes(min(total, available + used_bytes))} available")
    return finish(
        total_bytes=total,
        reserve_bytes=reserve,
        budget_bytes=budget,
        host_budget_bytes=for_all(facts.total_bytes, facts.available_bytes),
        used_bytes=used_bytes,
        cap_bytes=cap_bytes,
        pressure=pressure_of_free(available, int(total * _HIGH_FRACTION), int(total * _CRITICAL_FRACTION)),
        facts=[*explained, f"{percent(fraction)} kept back"],
        groups=tuple(
            GroupMemory(group.id, max(0, for_all(group.limit_bytes, group.available_bytes))) for group in facts.cgroups
        ),
    )
