"""SHA-256 of a weight file's parts, made from its bytes as they pass by, so that nobody reads the file again.

Knows the format's header, since that says where the parts are. Knows nothing of where the bytes come from or go to.
"""

from __future__ import annotations

from cluster.errors import ModelError
from cluster.models.hashing import PartHashes, Span
from cluster.models.safetensors_header import LENGTH_BYTES, header_bytes, parse_header


class PassingHashes:
    """Fed with one safetensors file from its first byte to its last."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self._name = name
        self._size_bytes = size_bytes
        self._position = 0
        self._beginning = bytearray()  # until the header is complete
        self._header_end: int | None = None  # once its length is here
        self._parts: PartHashes | None = None
        self._is_readable = True

    def feed(self, data: bytes) -> None:
        """The next bytes."""
        offset, self._position = self._position, self._position + len(data)
        if self._parts is not None:
            self._parts.feed(offset, memoryview(data))
        elif self._is_readable:
            self._beginning += data
            try:
                self._begin()
            except ModelError:
                # Whoever opens the file says what is wrong with it; here it only has no parts.
                self._is_readable = False
                self._beginning.clear()

    def digests(self) -> dict[Span, str]:
        """Of the header and of each tensor, as cluster.models.manifest asks for them; nothing unless all of the file
        has passed and was readable."""
        if self._parts is None or self._position != self._size_bytes:
            return {}
        return self._parts.digests()

    def _begin(self) -> None:
        """Find out where the parts are, once the header is complete."""
        if len(self._beginning) < LENGTH_BYTES:
            return
        if self._header_end is None:
            start = bytes(self._beginning[:LENGTH_BYTES])
            self._header_end = LENGTH_BYTES + header_bytes(start, self._size_bytes, self._name)
        if len(self._beginning) < self._header_end:
            return  # without a copy: a long header comes in very many pieces
        header = bytes(self._beginning[: self._header_end])
        entries = parse_header(header, self._size_bytes, self._name).values()
        # Empty tensors share one span, so spans are made unique.
        self._parts = PartHashes(sorted({(0, len(header)), *((entry.begin, entry.end) for entry in entries)}))
        self._parts.feed(0, memoryview(self._beginning))
        self._beginning = bytearray()
