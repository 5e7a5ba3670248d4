"""How much room a slice needs on the disk, and how a failing disk is explained."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from cluster.errors import ModelError
from node.weights.disk import check_room, writing


def _free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12 - free_bytes, free_bytes)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_room_is_what_is_needed_and_a_little_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, 105 << 20)
    check_room(tmp_path, 100 << 20)
    with pytest.raises(ModelError, match=r"100\.9 MiB .* 105\.0 MiB free: 9\d\d\.\d KiB too little.*--state"):
        check_room(tmp_path, (100 << 20) + 900_000)


def test_the_margin_of_a_large_slice_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, (100 << 30) + (256 << 20))
    check_room(tmp_path, 100 << 30)
    with pytest.raises(ModelError, match="too little"):
        check_room(tmp_path, (100 << 30) + 1)


def test_nothing_is_asked_of_a_full_disk_when_nothing_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _free(monkeypatch, 0)
    check_room(tmp_path, 0)


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "is full"), (errno.EROFS, "cannot write")])
def test_a_failing_disk_is_explained(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(ModelError, match=f"{words}.*--state"), writing(tmp_path):
        raise OSError(number, os.strerror(number))
