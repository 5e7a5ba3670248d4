"""The table while it grows: rows are printed as they are measured, and the page is written anew after every target, so
that a run that is broken off leaves what it has."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.machine import Beside
from tests.bench.page import quantity, render
from tests.bench.rows import Row, Section, unmeasured


@dataclass(slots=True)
class Table:
    """Sections of one run, and the page that they become."""

    path: Path
    machine: Mapping[str, str]
    client_cores: str
    beside: Beside
    quick: bool
    sections: list[Section] = field(default_factory=list)

    def begin(self, title: str) -> None:
        """The rows that follow are of this form."""
        self.sections.append(Section(title, [], time.monotonic()))
        sys.stdout.write(f"\n{title}\n")

    def add(self, target: int, measure: Callable[[], list[Row]]) -> None:
        """A target's rows; one that says why, where it cannot be measured."""
        try:
            rows = measure()
        # One target that breaks, for whatever reason, must not take the others' half an hour with it.
        except Exception as error:  # noqa: BLE001 - the reason is above
            rows = [unmeasured(target, f"target {target}", f"{type(error).__name__}: {error}"[:_REASON_CHARS_MAX])]
        for row in rows:
            _say(row)
        section = self.sections[-1]
        self.sections[-1] = Section(section.title, [*section.rows, *rows], section.began_s, time.monotonic())
        self.write()

    def write(self) -> None:
        text = render(
            self.sections, self.machine, client_cores=self.client_cores, beside=self.beside.told(), quick=self.quick
        )
        self.path.write_text(text, encoding="utf-8")


_REASON_CHARS_MAX = 500


def _say(row: Row) -> None:
    value = "-" if row.value is None else quantity(row.value, row.unit)
    ceiling = "" if row.ceiling is None else f" (ceiling {quantity(row.ceiling, row.unit)})"
    sys.stdout.write(f"  {row.target:>2} {row.name}: {value}{ceiling} {row.verdict} {row.note}".rstrip() + "\n")
    sys.stdout.flush()
