"""What `potluck doctor` finds out: one check, its verdict, and what to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Status(enum.StrEnum):
    """How a check came out. Only FAIL makes `doctor` end with exit code 1."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding, for people and for scripts."""

    name: str
    status: Status
    found: str
    do: str = ""  # the next step; empty when there is none

    def __post_init__(self) -> None:
        if self.status is Status.FAIL and not self.do:
            raise ValueError(f"the check {self.name!r} fails and does not say what to do")
