"""What runs have measured, section by section: the page is written from it. Pure.

A section holds the rows of one form of the model, or of something that no form has a part in. A target's rows are of
one run, so a run that measured some targets of a form replaces these and leaves the others with the runs they are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tests.bench.rows import Row


@dataclass(frozen=True, slots=True)
class Run:
    """When a section was measured, of what, on what, and beside what."""

    date: str  # when it began: ISO, to the minute, UTC; so later is greater
    commit: str
    machine: Mapping[str, str]
    quick: bool
    beside: str  # what else the machine was doing meanwhile
    seconds: float


@dataclass(frozen=True, slots=True)
class Part:
    """What one run measured of a section."""

    run: Run
    rows: tuple[Row, ...]

    @property
    def targets(self) -> tuple[int, ...]:
        return tuple(sorted({row.target for row in self.rows}))


@dataclass(frozen=True, slots=True)
class Section:
    """One form of the model, such as the dense shape in bf16. No target is in two parts."""

    title: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """In the order of their targets, whichever run they are of."""
        return tuple(sorted((row for part in self.parts for row in part.rows), key=lambda row: row.target))

    def measured_anew(self, new: Part) -> Section:
        """With `new` in the place of what older runs found of its targets."""
        kept = (
            replace(part, rows=tuple(row for row in part.rows if row.target not in new.targets)) for part in self.parts
        )
        return replace(self, parts=(*(part for part in kept if part.rows), new))


Record = tuple[Section, ...]


def measured_anew(record: Record, title: str, new: Part, order: Sequence[str]) -> Record:
    """With `new` in the section of that title. Sections stand in this order of their titles, unknown ones behind."""
    sections = {section.title: section for section in record}
    sections[title] = sections.get(title, Section(title, ())).measured_anew(new)
    places = {known: place for place, known in enumerate(order)}
    return tuple(sorted(sections.values(), key=lambda section: places.get(section.title, len(places))))


def newest(record: Record) -> Run | None:
    runs = [part.run for section in record for part in section.parts]
    return max(runs, key=lambda run: run.date, default=None)
