"""Hashes made of what passes by are those that reading the file would give."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from cluster.models.hashing import hash_file
from cluster.models.passing import PassingHashes
from cluster.models.safetensors_header import read_header
from cluster.quantities import MIB
from tests.weight_files import write_model


def _fed(data: bytes, piece_bytes: int, size_bytes: int | None = None) -> PassingHashes:
    hashes = PassingHashes("f", len(data) if size_bytes is None else size_bytes)
    for begin in range(0, len(data), piece_bytes):
        hashes.feed(data[begin : begin + piece_bytes])
    return hashes


@pytest.mark.parametrize("piece_bytes", [1, 7, 8, 1000, 1 << 20])
def test_every_part_has_the_hash_that_reading_gives(piece_bytes: int, tmp_path: Path) -> None:
    [path] = write_model(tmp_path, layers=2, tensor_bytes=400, shards=1).glob("*.safetensors")
    entries = read_header(path).values()
    begin = min(entry.begin for entry in entries)
    expected = hash_file(path, [(0, begin), *((entry.begin, entry.end) for entry in entries)], None, lambda _: None)
    assert _fed(path.read_bytes(), piece_bytes).digests() == expected


def test_a_file_that_has_not_passed_wholly_has_no_hashes(tmp_path: Path) -> None:
    [path] = write_model(tmp_path, layers=2, tensor_bytes=400, shards=1).glob("*.safetensors")
    data = path.read_bytes()
    assert _fed(data[:-1], 1000, len(data)).digests() == {}


def test_a_piece_of_a_long_header_costs_no_copy_of_what_came_before() -> None:
    """A header of 100 MiB comes in thousands of pieces."""
    header_bytes = 8 * MIB
    hashes = PassingHashes("f", 2 * header_bytes)
    tracemalloc.start()
    try:
        hashes.feed(header_bytes.to_bytes(8, "little") + bytes(header_bytes - 2))
        before_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        hashes.feed(b" ")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes - before_bytes < header_bytes // 2


@pytest.mark.parametrize("data", [b"", b"short", b"\xff" * 5000, (4).to_bytes(8, "little") + b"null" + bytes(5000)])
def test_what_is_no_weight_file_has_no_parts_and_does_no_harm(data: bytes) -> None:
    assert _fed(data, 100).digests() == {}
