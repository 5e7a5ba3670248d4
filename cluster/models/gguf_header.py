"""The header of a GGUF file: its metadata, and names, types, shapes and places of its tensors.

Owns: the file format, versions 2 and 3, and the refusal of files that lie. Reads no tensor data and knows nothing of
models. A header arrives from strangers, so every count and length is compared with the bytes that are left before
anything is allocated for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

from cluster.errors import ModelError
from cluster.limits import (
    GGUF_ENTRIES_MAX,
    GGUF_HEADER_BYTES_MAX,
    GGUF_ITEMS_MAX,
    GGUF_KEY_BYTES_MAX,
)
from cluster.models.gguf_types import GgmlType, UnreadType, type_of
from cluster.quantities import MIB, format_bytes

Value = bool | int | float | str | tuple[bool | int | float | str, ...]
"""A metadata value. Lists hold values of one kind and never lists."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_RANK_MAX = 4  # by the format
_EXTENT_MAX = 1 << 40  # no axis is longer
_SIZE_MAX = 1 << 50  # one PiB, far above any file
_ALIGNMENT, _ALIGNMENT_MAX = 32, 1 << 16
_READ_BYTES = 1 * MIB

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
"""Kinds of metadata numbers, as `struct` writes them; each is little-endian."""


class Readable(Protocol):
    """What gives bytes from its beginning on: a file, or an answer that is still arriving."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place. The last axis of `shape` is the one whose values lie side by side. Offsets are absolute in
    the file, half-open."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of the file at `path`."""
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            return parse_gguf_header(file, file_bytes, str(path))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def parse_gguf_header(file: Readable, file_bytes: int, name: str) -> GgufHeader:
    """Check the header at the beginning of `file`, which has `file_bytes`. Messages call it `name`."""
    source = _Source(file, file_bytes, name)
    magic = source.take(len(_MAGIC)) if file_bytes >= len(_MAGIC) else b""
    if magic != _MAGIC:
        raise ModelError(f"{name}: expected a GGUF file, found one that begins with {magic!r}; is this the right file?")
    version = source.number("I")
    if version not in _VERSIONS:
        hint = "it is written for big-endian machines" if version >= 1 << 16 else "convert the model again"
        raise ModelError(f"{name}: expected GGUF version 2 or 3, found {version}; {hint}")
    tensor_count, entry_count = source.count("tensors"), source.count("metadata entries")
    metadata: dict[str, Value] = {}
    for _ in range(entry_count):
        key = source.text(GGUF_KEY_BYTES_MAX, "a metadata key")
        if key in metadata:
            raise ModelError(f"{name}: the metadata key {key!r:.80} appears twice; download the file again")
        metadata[key] = source.value(key)
    places: dict[str, _Place] = {}
    for _ in range(tensor_count):
        tensor = source.text(GGUF_KEY_BYTES_MAX, "a tensor's name")
        if not tensor.isprintable() or not tensor:
            raise ModelError(f"{name}: expected printable tensor names, found {tensor!r:.80}; download the file again")
        if tensor in places:
            raise ModelError(f"{name}: the tensor {tensor!r:.80} appears twice; download the file again")
        places[tensor] = source.place(tensor)
    alignment = _alignment(metadata, name)
    data_begin = -(-source.position // alignment) * alignment
    tensors = {tensor: _tensor(tensor, place, data_begin, alignment, name) for tensor, place in places.items()}
    _check_extent(tensors.values(), file_bytes, name)
    return GgufHeader(metadata, tensors)


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor as the header lists it; the offset counts from where the data begins."""

    type: GgmlType
    shape: tuple[int, ...]
    offset: int


class _Source:
    """The header's bytes, read as far as they are needed and never further than a header may reach."""

    def __init__(self, file: Readable, file_bytes: int, name: str) -> None:
        self._file = file
        self._name = name
        self._end = min(file_bytes, GGUF_HEADER_BYTES_MAX)
        self._whole = file_bytes <= GGUF_HEADER_BYTES_MAX
        self._data = bytearray()
        self._items_left = GGUF_ITEMS_MAX
        self.position = 0

    @property
    def _left(self) -> int:
        return self._end - self.position

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > self._left:
            raise self._cut_short(f"{size} more bytes of header")
        end = self.position + size
        if end > len(self._data):
            missing = max(end - len(self._data), _READ_BYTES)
            self._data += self._file.read(min(missing, self._end - len(self._data)))
            if end > len(self._data):
                raise self._cut_short(f"{size} more bytes of header")
        found = bytes(self._data[self.position : end])
        self.position = end
        return found

    def number(self, code: str) -> int:
        (found,) = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))
        return int(found)

    def count(self, what: str) -> int:
        """How many things follow, each of which takes at least twelve bytes."""
        found = self.number("Q")
        if found > min(GGUF_ENTRIES_MAX, self._left // 12):
            raise self._cut_short(f"{found} {what}")
        return found

    def text(self, bytes_max: int, what: str) -> str:
        size = self.number("Q")
        if size > min(bytes_max, self._left):
            raise self._cut_short(f"{what} of {size} bytes")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self._name}: {what} is no UTF-8 text; download the file again") from error

    def value(self, key: str) -> Value:
        kind = self.number("I")
        if kind != _ARRAY:
            return self._items(kind, 1, key)[0]
        item_kind, count = self.number("I"), self.number("Q")
        if item_kind == _ARRAY:
            raise ModelError(f"{self._name}: {key!r:.80} is a list of lists, which no model's metadata has")
        return self._items(item_kind, count, key)

    def _items(self, kind: int, count: int, key: str) -> tuple[bool | int | float | str, ...]:
        if kind != _STRING and kind not in _NUMBERS:
            raise ModelError(
                f"{self._name}: {key!r:.80} is of kind {kind}, which GGUF does not have; download it again"
            )
        size = 8 if kind == _STRING else struct.calcsize(_NUMBERS[kind])  # a text takes its length and more
        if count > self._left // size:
            raise self._cut_short(f"{count} items of {key!r:.80}")
        if count > self._items_left:
            raise ModelError(f"{self._name}: its metadata lists more than {GGUF_ITEMS_MAX} items; is this a model?")
        self._items_left -= count
        if kind == _STRING:
            return tuple(self.text(self._left, f"a text of {key!r:.80}") for _ in range(count))
        numbers = struct.unpack(f"<{count}{_NUMBERS[kind]}", self.take(count * size))
        return tuple(bool(number) for number in numbers) if kind == _BOOL else numbers

    def place(self, tensor: str) -> _Place:
        where = f"{self._name}: tensor {tensor!r:.80}"
        rank = self.number("I")
        if not 1 <= rank <= _RANK_MAX:
            raise ModelError(f"{where}: expected 1 to {_RANK_MAX} axes, found {rank}; download the file again")
        # Files list the fastest axis first.
        shape = tuple(reversed([self.number("Q") for _ in range(rank)]))
        if not all(0 < extent <= _EXTENT_MAX for extent in shape):
            raise ModelError(f"{where}: its shape {list(shape)} is impossible; download the file again")
        found = type_of(self.number("I"))
        if isinstance(found, UnreadType):
            known = ", ".join(kind.name for kind in GgmlType)
            raise ModelError(
                f"{where}: is stored as {found.name}, which Potluck does not read; it reads {known}. "
                "Use another version of this model"
            )
        return _Place(found, shape, self.number("Q"))

    def _cut_short(self, what: str) -> ModelError:
        if self._whole:
            return ModelError(f"{self._name}: its header claims {what}, but the file ends before; download it again")
        limit = format_bytes(GGUF_HEADER_BYTES_MAX)
        return ModelError(f"{self._name}: its header claims {what}, more than the {limit} that are read of a header")


def _alignment(metadata: Mapping[str, Value], name: str) -> int:
    found = metadata.get("general.alignment", _ALIGNMENT)
    if type(found) is not int or not 8 <= found <= _ALIGNMENT_MAX or found & (found - 1):
        raise ModelError(f"{name}: expected general.alignment to be a power of two from 8, found {found!r:.40}")
    return found


def _tensor(tensor: str, place: _Place, data_begin: int, alignment: int, name: str) -> GgufTensor:
    where = f"{name}: tensor {tensor!r:.80}"
    if place.shape[-1] % place.type.block_values:
        raise ModelError(
            f"{where}: rows of {place.shape[-1]} values do not divide into blocks of {place.type.block_values}, "
            f"as {place.type.name} stores them; download the file again"
        )
    if place.offset % alignment or place.offset > _SIZE_MAX:
        raise ModelError(f"{where}: begins at {place.offset}, no multiple of {alignment}; download the file again")
    begin = data_begin + place.offset
    size = prod(place.shape) // place.type.block_values * place.type.block_bytes
    return GgufTensor(tensor, place.type, place.shape, begin, begin + size)


def _check_extent(tensors: Iterable[GgufTensor], file_bytes: int, name: str) -> None:
    """Tensors lie within the file and never upon each other; between them there may be padding."""
    covered, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin < covered:
            raise ModelError(f"{name}: the tensors {tensor.name!r} and {before!r} overlap; download the file again")
        covered, before = tensor.end, tensor.name
    if covered > file_bytes:
        raise ModelError(
            f"{name}: expected {format_bytes(covered)} according to its header, but the file ends after "
            f"{format_bytes(file_bytes)}; download it again"
        )
