"""The table while it grows: rows are printed as they are measured, and the page and its record are written anew after
every target, so that a run that is broken off leaves what it has, beside what others had measured before."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.bench import record_file
from tests.bench.machine import Beside, now
from tests.bench.page import quantity, render
from tests.bench.record import Part, Record, Run, measured_anew
from tests.bench.rows import Row, unmeasured


@dataclass(slots=True)
class Table:
    """What this run measures, section by section, in the record of what has been measured."""

    page: Path
    run: Run  # of the section that grows
    beside: Beside
    order: Sequence[str]  # of the sections' titles
    record: Record = field(init=False)
    _before: Record = field(init=False)
    _title: str = ""
    _rows: list[Row] = field(default_factory=list)
    _began_s: float = 0.0

    def __post_init__(self) -> None:
        self.record = self._before = record_file.load(record_file.beside_page(self.page))

    def begin(self, title: str) -> None:
        """The rows that follow are of this section."""
        self._before, self._title, self._rows = self.record, title, []
        self.run, self._began_s = replace(self.run, date=now()), time.monotonic()
        self.beside.forget()
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
        self._rows += rows
        self.run = replace(self.run, beside=self.beside.told(), seconds=round(time.monotonic() - self._began_s, 1))
        self.record = measured_anew(self._before, self._title, Part(self.run, tuple(self._rows)), self.order)
        self._write()

    def _write(self) -> None:
        record_file.save(self.record, record_file.beside_page(self.page))
        self.page.write_text(render(self.record), encoding="utf-8")


_REASON_CHARS_MAX = 500


def _say(row: Row) -> None:
    value = "-" if row.value is None else quantity(row.value, row.unit)
    ceiling = "" if row.ceiling is None else f" (ceiling {quantity(row.ceiling, row.unit)})"
    sys.stdout.write(f"  {row.target:>2} {row.name}: {value}{ceiling} {row.verdict} {row.note}".rstrip() + "\n")
    sys.stdout.flush()
