"""What a journal remembers of tensors, whatever a kill or a disk has done to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.weights.journal import Journal, Mark, read_journal


def _journal(path: Path, *marks: Mark) -> None:
    journal = Journal(path, {})
    journal.append(marks)
    journal.close()


def test_the_last_mark_of_a_tensor_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    _journal(path, Mark("a", 5, False), Mark("b", 3, True), Mark("a", 0, False))
    assert read_journal(path) == {"a": Mark("a", 0, False), "b": Mark("b", 3, True)}


def test_a_line_torn_by_a_kill_is_dropped_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    _journal(path, Mark("a", 5, True), Mark("b", 9, True))
    path.write_bytes(path.read_bytes()[:-4])
    marks = read_journal(path)
    assert set(marks) == {"a"}
    journal = Journal(path, marks)
    journal.append([Mark("c", 1, True)])
    journal.close()
    assert set(read_journal(path)) == {"a", "c"}


@pytest.mark.parametrize("rubbish", [b"\0\0\0\0", b'["b", -1, true]', b'["b", 1]', b"[" * 100_000, b"\xff\xfe", b"7"])
def test_reading_stops_at_rubbish(tmp_path: Path, rubbish: bytes) -> None:
    path = tmp_path / "journal"
    _journal(path, Mark("a", 5, True))
    path.write_bytes(path.read_bytes() + rubbish + b"\n" + path.read_bytes().replace(b'"a"', b'"z"'))
    assert set(read_journal(path)) == {"a"}
