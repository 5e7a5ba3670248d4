"""Safetensors files written by hand, for tests that need no tensor library or that need a file to lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from cluster.types import DType

Tensors = Mapping[str, tuple[DType, tuple[int, ...]]]


def header_of(tensors: Tensors) -> dict[str, object]:
    """The header that a correct writer makes of `tensors`, laid one after another."""
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * dtype.size_bytes
        header[name] = {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}
    return header


def file_of(header: object, data_bytes: int, *, pad: int = 0) -> bytes:
    """A whole file: `header` as JSON (or as it is, when it is bytes already), then zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write a correct file of zeros."""
    data_bytes = sum(prod(shape) * dtype.size_bytes for dtype, shape in tensors.values())
    path.write_bytes(file_of(header_of(tensors), data_bytes))
