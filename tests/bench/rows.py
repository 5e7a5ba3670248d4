"""A line of the table: what was measured, what was possible, what was promised, and whether the promise holds. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NO_PEERS = "llama.cpp is not in this run; make bench-peers has it"


@dataclass(frozen=True, slots=True)
class Promise:
    """A target, in the unit of its row."""

    kind: Literal["at most", "at least"]
    limit: float

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.kind == "at most" else value >= self.limit

    def missed_by(self, value: float) -> float:
        """The share by which `value` would have to change; 0 where the promise holds."""
        if self.holds(value) or value == 0:
            return 0.0
        return 1 - self.limit / value if self.kind == "at most" else self.limit / value - 1


def at_most(limit: float) -> Promise:
    return Promise("at most", limit)


def at_least(limit: float) -> Promise:
    return Promise("at least", limit)


@dataclass(frozen=True, slots=True)
class Row:
    """`value` is None where nothing could be measured; then `note` says why. `ceiling` is the best value that stage
    passes and hops, measured alone, allow, in the same unit."""

    target: int
    name: str
    value: float | None
    unit: str  # "" for a ratio
    ceiling: float | None = None
    promise: Promise | None = None  # None for a number that only explains others
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.promise is None:
            return ""
        if self.promise.holds(self.value):
            return "holds"
        direction = "less" if self.promise.kind == "at most" else "more"
        return f"**misses**: {self.promise.missed_by(self.value):.0%} {direction} needed"


def unmeasured(target: int, name: str, why: str) -> Row:
    return Row(target, name, None, "", note=" ".join(why.split()))
