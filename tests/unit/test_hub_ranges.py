"""A mirror that ignores ranges is read past, not into memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import ModelError
from cluster.quantities import MIB
from coordinator import hub_headers

_PIECE_BYTES = 64 * 1024
_TENSOR = bytes(range(256)) * 1024


def _mirror(before_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers every question with all of a file: `before_bytes`, and then the tensor."""

    def pieces() -> Iterator[bytes]:
        for _ in range(before_bytes // _PIECE_BYTES):
            yield bytes(_PIECE_BYTES)
        odd = bytes(before_bytes % _PIECE_BYTES) + _TENSOR
        for begin in range(0, len(odd), _PIECE_BYTES):
            yield odd[begin : begin + _PIECE_BYTES]

    @contextmanager
    def stream(*_args: Any, **_options: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(status_code=200, iter_bytes=pieces)

    monkeypatch.setattr(hub_headers, "get_session", lambda: SimpleNamespace(stream=stream))
    monkeypatch.setattr(hub_headers, "hf_raise_for_status", lambda _response: None)


def test_what_comes_before_the_range_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = 16 * MIB + 100
    _mirror(begin, monkeypatch)
    tracemalloc.start()
    try:
        found = hub_headers._read("http://mirror/file", begin, begin + len(_TENSOR))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == _TENSOR
    assert peak_bytes < 2 * MIB


def test_a_file_that_ends_before_the_range_does_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    _mirror(MIB, monkeypatch)
    with pytest.raises(ModelError, match=f"ended at byte {MIB + len(_TENSOR)}"):
        hub_headers._read("http://mirror/file", MIB + 7, MIB + len(_TENSOR) + 1)
