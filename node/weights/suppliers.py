"""Which source gets the next run of bytes, and whose run is taken back. Pure: told what was measured and when.

The rule: each source has few runs in flight; the next run goes to the fastest one that has room, first of all to
one that was not measured yet; and it is the run that the fewest others could deliver. A slow source gets none that it
would still be busy with when everything else is here. When nothing is left to give, a source with room takes over
what it would finish in less than half the time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from cluster.models.manifest import TensorRecord
from cluster.quantities import MIB
from node.weights.ranges import RUN_BYTES_MAX, Run, plan_runs

_IN_FLIGHT_ALONE, _IN_FLIGHT = 4, 2
"""Runs at a time: hides the round trip and the disk's syncs; more only shares the same link."""

_RUN_BYTES_MIN = 4 * MIB
_RUNS_PER_SUPPLIER = 8
"""With several sources runs are short enough that a fast one gets more of them than a slow one."""

_TAKE_OVER_FACTOR = 2.0
"""So much faster must a source be to take over a run: it asks again for what was under way, and rates vary."""

_LATE_FACTOR = 1.1
"""Rates vary; and what is late by a little is better begun than taken over."""

_SMOOTHING = 0.5  # of each new measurement in the rate: links change within seconds


@dataclass(eq=False, slots=True)
class Supplier:
    """A source in a transfer, and how it does."""

    is_coordinator: bool
    holds: Collection[str] | None  # names of tensors; None for all of them
    rate_bytes_s: float | None = None
    in_flight: int = 0
    left_bytes: int = 0  # of what is in flight
    left_out: bool = False

    def can_deliver(self, run: Run) -> bool:
        return not self.left_out and (self.holds is None or all(t.name in self.holds for t in run.tensors))

    def measured(self, count: int, seconds: float) -> None:
        rate = count / seconds if seconds > 0 else 0.0
        old = self.rate_bytes_s
        self.rate_bytes_s = rate if old is None else old + (rate - old) * _SMOOTHING


def split(missing: Iterable[TensorRecord], received_bytes: dict[str, int], suppliers: Sequence[Supplier]) -> list[Run]:
    """Runs that each supplier can deliver wholly or not at all."""
    groups: dict[tuple[bool, ...], list[TensorRecord]] = {}
    total_bytes = 0
    for tensor in missing:
        key = tuple(s.holds is None or tensor.name in s.holds for s in suppliers)
        groups.setdefault(key, []).append(tensor)
        total_bytes += tensor.size_bytes
    run_bytes_max = RUN_BYTES_MAX
    if len(suppliers) > 1:
        fair_bytes = total_bytes // (len(suppliers) * _RUNS_PER_SUPPLIER)
        run_bytes_max = min(max(fair_bytes, _RUN_BYTES_MIN), RUN_BYTES_MAX)
    return [run for group in groups.values() for run in plan_runs(group, received_bytes, run_bytes_max)]


def choose(suppliers: Sequence[Supplier], pending: Sequence[Run]) -> tuple[Supplier, Run] | None:
    """Who gets which run now; None when nobody with room can deliver any, or none that would not be late."""
    end_s = _end_s(suppliers, pending)
    for supplier in sorted((s for s in suppliers if _has_room(s, suppliers)), key=_preference):
        runs = [run for run in pending if supplier.can_deliver(run) and not _is_late(supplier, run, suppliers, end_s)]
        if runs:
            return supplier, min(runs, key=lambda run: sum(s.can_deliver(run) for s in suppliers))
    return None


def _end_s(suppliers: Sequence[Supplier], pending: Sequence[Run]) -> float:
    """When everything would be here if all sources were busy to the end."""
    useful = [s for s in suppliers if not s.left_out]
    left_bytes = sum(run.size_bytes for run in pending) + sum(s.left_bytes for s in useful)
    rate_bytes_s = sum(s.rate_bytes_s or 0.0 for s in useful)
    return left_bytes / rate_bytes_s if rate_bytes_s else math.inf


def _is_late(supplier: Supplier, run: Run, suppliers: Sequence[Supplier], end_s: float) -> bool:
    """Whether the run would end after everything else, though a faster source could deliver it."""
    rate_bytes_s = supplier.rate_bytes_s
    if rate_bytes_s is None or (supplier.left_bytes + run.size_bytes) <= rate_bytes_s * end_s * _LATE_FACTOR:
        return False
    return any((other.rate_bytes_s or 0.0) > rate_bytes_s and other.can_deliver(run) for other in suppliers)


def taken_back(suppliers: Sequence[Supplier], running: Iterable[tuple[Supplier, Run]]) -> Run | None:
    """A run that another source with room would finish much sooner; of several, one of the slowest source's."""
    for supplier, run in sorted(running, key=lambda item: _rate_of_a_run(item[0], item[0].in_flight)):
        least = _TAKE_OVER_FACTOR * _rate_of_a_run(supplier, supplier.in_flight)
        able = (other for other in suppliers if other is not supplier and other.can_deliver(run))
        if any(_has_room(o, suppliers) and _rate_of_a_run(o, o.in_flight + 1) > least for o in able):
            return run
    return None


def _rate_of_a_run(supplier: Supplier, in_flight: int) -> float:
    """What each of its runs gets of what a source delivers; nothing is known of one that was not measured."""
    return (supplier.rate_bytes_s or 0.0) / max(in_flight, 1)


def _has_room(supplier: Supplier, suppliers: Sequence[Supplier]) -> bool:
    alone = sum(not s.left_out for s in suppliers) == 1
    return not supplier.left_out and supplier.in_flight < (_IN_FLIGHT_ALONE if alone else _IN_FLIGHT)


def _preference(supplier: Supplier) -> tuple[float, ...]:
    """Lowest first. The coordinator serves everybody, so of two unknown sources it comes second."""
    if supplier.rate_bytes_s is None:
        return (0.0, supplier.in_flight, supplier.is_coordinator)
    return (1.0, -supplier.rate_bytes_s, supplier.is_coordinator)
