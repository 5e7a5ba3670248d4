"""GGUF files written by hand from the published format: header, metadata and tensors, as any tool may write them.

Independent of the code under test. What tensors' bytes mean is `tests.gguf_blocks`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

Stored = tuple[str, tuple[int, ...], bytes]
"""A tensor's type, its shape with the fastest axis last, and its bytes."""

NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q4_K": 12, "Q5_K": 13,
    "Q6_K": 14, "BF16": 30, "MXFP4": 39,
}  # fmt: skip


def write_gguf(path: Path, metadata: Mapping[str, object], tensors: Mapping[str, Stored]) -> Path:
    with path.open("wb") as file:
        file.writelines(_pieces(metadata, tensors, 3))
    return path


def gguf_bytes(metadata: Mapping[str, object], tensors: Mapping[str, Stored], *, version: int = 3) -> bytes:
    """A whole file. Python's int, float, bool, str and lists of them become the kinds that converters write."""
    return b"".join(_pieces(metadata, tensors, version))


def _pieces(metadata: Mapping[str, object], tensors: Mapping[str, Stored], version: int) -> Iterator[bytes]:
    """The file from its first byte to its last."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        header += _text(key) + _value(value)
    offset = 0
    for name, (kind, shape, stored) in tensors.items():
        offset += -offset % 32
        header += _text(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}QIQ", *reversed(shape), NUMBERS[kind], offset)
        offset += len(stored)
    yield header + bytes(-len(header) % 32)
    offset = 0
    for _, _, stored in tensors.values():
        yield bytes(-offset % 32)
        offset += -offset % 32 + len(stored)
        yield stored


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: object) -> bytes:
    match value:
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case list():
            kind, items = _items(value)
            return struct.pack("<IIQ", 9, kind, len(value)) + items
    raise TypeError(f"no GGUF value: {value!r}")


def _items(values: list[object]) -> tuple[int, bytes]:
    match values[0] if values else 0:
        case bool():
            return 7, bytes(values)  # type: ignore[arg-type]
        case int():
            return 5, struct.pack(f"<{len(values)}i", *values)
        case float():
            return 6, struct.pack(f"<{len(values)}f", *values)
    return 8, b"".join(_text(str(value)) for value in values)
