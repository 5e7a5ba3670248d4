"""What `make bench` keeps of its runs, and the page that it writes from them, with made-up numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import UsageError
from tests.bench import record_file
from tests.bench.machine import Beside
from tests.bench.page import render
from tests.bench.record import Part, Record, Run, Section, measured_anew
from tests.bench.rows import Row, at_least, at_most, unmeasured
from tests.bench.table import Table

OLD = Run("2026-11-20 09:00 UTC", "aaaaaaa", {"processor": "abacus"}, quick=False, beside="nothing ran", seconds=12.3)
NEW = replace(OLD, date="2026-11-21 08:00 UTC", commit="bbbbbbb", seconds=4.0)
GOOD = Row(1, "good", 1.0, "", 0.9, at_most(1.05))
BAD = Row(2, "bad", 0.5, "", 1.0, at_least(0.9), note="a | b")
PLAIN = Row(2, "plain", 112.0, "tok/s")
CARD = unmeasured(9, "card", "no GPU here")
DENSE = Section("Dense", (Part(OLD, (GOOD, BAD, PLAIN, CARD)),))
ORDER = ("Dense", "Experts")


def test_a_run_replaces_the_targets_that_it_measured_and_leaves_the_others_with_theirs() -> None:
    (section,) = measured_anew((DENSE,), "Dense", Part(NEW, (replace(PLAIN, value=120.0),)), ORDER)
    assert section.parts == (Part(OLD, (GOOD, CARD)), Part(NEW, (replace(PLAIN, value=120.0),)))
    assert [(row.target, row.name) for row in section.rows] == [(1, "good"), (2, "plain"), (9, "card")]


def test_of_a_run_whose_targets_are_all_measured_anew_nothing_is_left() -> None:
    (section,) = measured_anew((DENSE,), "Dense", Part(NEW, (GOOD, BAD, CARD)), ORDER)
    assert section.parts == (Part(NEW, (GOOD, BAD, CARD)),)


def test_sections_stand_in_their_order_whichever_was_measured_first() -> None:
    record: Record = ()
    for title in ("Of old", "Experts", "Dense"):
        record = measured_anew(record, title, Part(NEW, (GOOD,)), ORDER)
    assert [section.title for section in record] == ["Dense", "Experts", "Of old"]


def test_the_file_keeps_everything_with_a_row_to_a_line(tmp_path: Path) -> None:
    record = (DENSE, Section("Experts", (Part(NEW, (GOOD,)), Part(OLD, (PLAIN,)))))
    record_file.save(record, tmp_path / "page.json")
    assert record_file.load(tmp_path / "page.json") == record
    assert '{"target": 2, "name": "plain", "value": 112.0, "unit": "tok/s"},\n' in record_file.text_of(record)


@pytest.mark.parametrize("text", ["{", "[]", '{"sections": [{"title": "x", "parts": [{"run": {}, "rows": []}]}]}'])
def test_a_file_that_no_run_wrote_is_refused_with_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "page.json").write_text(text)
    with pytest.raises(UsageError, match="remove it to begin anew"):
        record_file.load(tmp_path / "page.json")


def test_a_page_must_not_be_its_own_record() -> None:
    with pytest.raises(UsageError, match="expected --write with a page"):
        record_file.beside_page(Path("page.json"))


def test_the_page_shows_every_row_and_counts_what_holds_in_all_sections() -> None:
    page = render((DENSE, Section("Experts", (Part(OLD, (GOOD,)),))))
    assert "2 of 3 measured targets hold; rows that could not be measured here: 1." in page
    assert "Not measured yet: targets 3, 4, 5, 6, 7, 8, 10, 11." in page
    assert "| 1 | good | 1.00 | 0.90 | at most 1.05 | holds |" in page
    assert "| 2 | bad | 0.50 | 1.00 | at least 0.90 | **misses**: 80% more needed (a \\| b) |" in page
    assert "| 2 | plain | 112 tok/s |  |  |  |" in page
    assert "| 9 | card |  |  |  | not measured (no GPU here) |" in page
    assert "| processor | abacus |" in page
    assert "Another commit" not in page and "quick" not in page


def test_the_page_says_which_run_each_target_is_of_and_whether_it_is_of_another_commit() -> None:
    page = render(measured_anew((DENSE,), "Dense", Part(replace(NEW, quick=True), (PLAIN,)), ORDER))
    assert "| Dense | 1, 9 | 2026-11-20 09:00 UTC | aaaaaaa | 1 |  |" in page
    assert "| Dense | 2 | 2026-11-21 08:00 UTC | bbbbbbb | 1 | quick |" in page
    old, new = (line for line in page.splitlines() if line.startswith("Targets"))
    assert "Targets 1, 9: measured on 2026-11-20 09:00 UTC at commit aaaaaaa, in 12 s." in old
    assert "**Another commit** than the newest here, bbbbbbb." in old and "quick" not in old
    assert "Targets 2: measured" in new and "**A quick run**" in new and "Another commit" not in new
    assert "Meanwhile nothing ran." in new
    assert page.count("abacus") == 1


def test_runs_on_two_machines_say_which_each_is_of() -> None:
    elsewhere = replace(NEW, machine={"processor": "slide rule"})
    page = render((DENSE, Section("Experts", (Part(elsewhere, (GOOD,)),))))
    assert "| aaaaaaa | 1 |" in page and "| bbbbbbb | 2 |" in page
    assert page.index("## Machine 1") < page.index("abacus") < page.index("## Machine 2") < page.index("slide rule")


def test_a_run_that_is_broken_off_has_left_what_it_measured_beside_what_was_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    record_file.save((DENSE,), tmp_path / "page.json")
    table = Table(page, NEW, Beside(), ORDER)
    table.begin("Dense")
    table.add(1, lambda: [replace(GOOD, value=2.0)])
    (section,) = record_file.load(tmp_path / "page.json")
    assert [part.targets for part in section.parts] == [(2, 9), (1,)]
    table.add(9, lambda: [Row(9, "card", 1 / 0, "")])
    (section,) = record_file.load(tmp_path / "page.json")
    assert [part.targets for part in section.parts] == [(2,), (1, 9)]
    assert "not measured (ZeroDivisionError: division by zero)" in page.read_text()
