"""docs/benchmarks.json: what runs have measured, a row to a line, so that what a run changes can be read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import UsageError
from tests.bench.record import Part, Record, Run, Section
from tests.bench.rows import Promise, Row


def beside_page(page: Path) -> Path:
    """Where the page's record is kept."""
    if page.suffix != ".md":
        raise UsageError(f"expected --write with a page such as page.md, beside which page.json is kept, found {page}")
    return page.with_suffix(".json")


def load(path: Path) -> Record:
    """Empty where nothing has been measured."""
    if not path.exists():
        return ()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            Section(section["title"], tuple(_read_part(part) for part in section["parts"]))
            for section in found["sections"]
        )
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UsageError(f"expected {path} as a run writes it, found {problem}; remove it to begin anew") from error


def save(record: Record, path: Path) -> None:
    path.write_text(text_of(record), encoding="utf-8")


def text_of(record: Record) -> str:
    return f'{{"sections": [\n{_joined(_section_text(section) for section in record)}\n]}}\n'


def _section_text(section: Section) -> str:
    return f'{{"title": {_line(section.title)}, "parts": [\n{_joined(map(_part_text, section.parts))}\n]}}'


def _part_text(part: Part) -> str:
    run = json.dumps(asdict(part.run), ensure_ascii=False, indent=1)
    return f'{{"run": {run},\n"rows": [\n{_joined(_line(_told(row)) for row in part.rows)}\n]}}'


def _told(row: Row) -> dict[str, object]:
    """Its fields, without those that are as empty as they are by default."""
    return {name: value for name, value in asdict(row).items() if name == "value" or value not in (None, "")}


def _read_part(part: Any) -> Part:
    return Part(Run(**part["run"]), tuple(_read_row(**row) for row in part["rows"]))


def _read_row(promise: dict[str, Any] | None = None, unit: str = "", **fields: Any) -> Row:
    return Row(unit=unit, promise=None if promise is None else Promise(**promise), **fields)


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _joined(texts: Iterable[str]) -> str:
    return ",\n".join(texts)
