"""What of a model's tensors is on disk, remembered through a kill.

One line for each event, appended, the last one of a tensor counts. A line `verified` is written only after the
tensor's bytes were checked and synced to disk. A line without it is a hint: the bytes are checked before use,
so it may be lost or, after a power cut, wrong.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.models.hashing import write_atomically


@dataclass(frozen=True, slots=True)
class Mark:
    """The first `received_bytes` of tensor `name` are in its file."""

    name: str
    received_bytes: int
    verified: bool


class Journal:
    """An open journal. `append` may be called from several threads."""

    def __init__(self, path: Path, marks: Mapping[str, Mark]) -> None:
        """Begin a journal at `path` that says exactly `marks`, in place of whatever is there."""
        self.marks = dict(marks)
        self._lock = threading.Lock()
        write_atomically(path, b"".join(_line(mark) for mark in self.marks.values()))
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def append(self, marks: Iterable[Mark]) -> None:
        marks = tuple(marks)
        data = b"".join(_line(mark) for mark in marks)
        with self._lock:
            while data:  # a nearly full disk takes a part and refuses the rest
                data = data[os.write(self._handle, data) :]
            self.marks.update((mark.name, mark) for mark in marks)

    def close(self) -> None:
        os.close(self._handle)


def read_journal(path: Path) -> dict[str, Mark]:
    """The last mark of each tensor. Reading stops at the first line that is none: a kill tears only the end."""
    marks: dict[str, Mark] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return marks
    for line in lines[:-1]:
        mark = _parse(line)
        if mark is None:
            break
        marks[mark.name] = mark
    return marks


def _line(mark: Mark) -> bytes:
    return json.dumps([mark.name, mark.received_bytes, mark.verified]).encode() + b"\n"


def _parse(line: bytes) -> Mark | None:
    try:
        match json.loads(line):
            case [str(name), int(received_bytes), bool(verified)] if received_bytes >= 0:
                return Mark(name, received_bytes, verified)
    except (ValueError, RecursionError):
        pass
    return None
