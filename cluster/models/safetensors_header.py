"""The header of a safetensors file: names, types, shapes and places of its tensors.

Owns: the file format (8 bytes little-endian length, that much JSON, then the tensors back to back) and the
refusal of files that lie. Reads no tensor data and knows nothing of models. Our own parser, because the
coordinator and the base install do without the safetensors package, and because a header arrives from
strangers: every number in it is checked before anything is allocated or read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from cluster.errors import ModelError
from cluster.limits import SAFETENSORS_HEADER_BYTES_MAX
from cluster.models.strict_json import parse_object
from cluster.quantities import format_bytes
from cluster.types import DType

LENGTH_BYTES = 8
_RANK_MAX = 64  # what torch allows; bounds the work that one entry can cause
_EXTENT_MAX = 1 << 63  # no file is larger


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor's place. Offsets are absolute in the file, half-open."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of the file at `path`."""
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            start = file.read(LENGTH_BYTES)
            prefix = start + file.read(header_bytes(start, file_bytes, str(path)))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return parse_header(prefix, file_bytes, str(path))


def header_bytes(start: bytes, file_bytes: int, name: str) -> int:
    """The length of the JSON that follows the first eight bytes, once it is known to be possible."""
    if len(start) < LENGTH_BYTES or file_bytes < LENGTH_BYTES:
        raise ModelError(f"{name}: expected a safetensors file, found only {file_bytes} bytes; download it again")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > SAFETENSORS_HEADER_BYTES_MAX:
        raise ModelError(
            f"{name}: its header claims {format_bytes(length)}, and at most "
            f"{format_bytes(SAFETENSORS_HEADER_BYTES_MAX)} are allowed; this is no safetensors file or it is damaged"
        )
    if LENGTH_BYTES + length > file_bytes:
        raise ModelError(
            f"{name}: its header claims {length} bytes, but the file ends after {file_bytes}; download it again"
        )
    return length


def parse_header(prefix: bytes, file_bytes: int, name: str) -> dict[str, TensorEntry]:
    """Check the header in `prefix`, the beginning of a file of `file_bytes`. Messages call the file `name`."""
    length = header_bytes(prefix, file_bytes, name)
    text = prefix[LENGTH_BYTES : LENGTH_BYTES + length]
    if len(text) < length:
        raise ModelError(f"{name}: expected {length} bytes of header, found {len(text)}; download it again")
    fields = parse_object(text, f"{name}: header")
    _check_metadata(fields.pop("__metadata__", None), name)
    data_begin = LENGTH_BYTES + length
    entries = {tensor: _entry(tensor, value, data_begin, name) for tensor, value in fields.items()}
    _check_coverage(entries.values(), data_begin, file_bytes, name)
    return entries


def _check_metadata(metadata: object, name: str) -> None:
    if metadata is None:  # MLX writes null where it has nothing to say
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{name}: expected __metadata__ to map text to text; download it again")


def _entry(tensor: str, value: object, data_begin: int, name: str) -> TensorEntry:
    where = f"{name}: tensor {tensor!r}"
    if not tensor.isprintable():
        raise ModelError(f"{where}: expected a printable name; download the file again")
    if not isinstance(value, dict):
        raise ModelError(f"{where}: expected dtype, shape and data_offsets, found {type(value).__name__}")
    dtype = _dtype(value.get("dtype"), where)
    shape = _extents(value.get("shape"), f"{where}: shape")
    offsets = _extents(value.get("data_offsets"), f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{where}: expected data_offsets [begin, end], found {list(offsets)}; download the file again")
    needed = prod(shape) * dtype.size_bytes
    if offsets[1] - offsets[0] != needed:
        raise ModelError(
            f"{where}: {dtype} of shape {list(shape)} takes {needed} bytes, but its data_offsets span "
            f"{offsets[1] - offsets[0]}; download the file again"
        )
    return TensorEntry(tensor, dtype, shape, data_begin + offsets[0], data_begin + offsets[1])


def _dtype(value: object, where: str) -> DType:
    try:
        return DType(value)  # type: ignore[arg-type]
    except ValueError:
        raise ModelError(
            f"{where}: has the element type {value!r:.40}, which Potluck does not read; "
            f"it reads {', '.join(DType)}. Use another version of this model"
        ) from None


def _extents(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _RANK_MAX:
        raise ModelError(f"{where}: expected a list of at most {_RANK_MAX} numbers; download the file again")
    for extent in value:
        # bool is an int to Python and must not pass for one.
        if type(extent) is not int or not 0 <= extent < _EXTENT_MAX:
            raise ModelError(f"{where}: expected whole numbers from 0, found {extent!r:.40}; download the file again")
    return tuple(value)


def _check_coverage(entries: Iterable[TensorEntry], data_begin: int, file_bytes: int, name: str) -> None:
    """The tensors tile the rest of the file: the format allows no hole, no overlap and no tail."""
    covered, before = data_begin, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != covered:
            fault = "overlap" if entry.begin < covered else "leave a hole"
            raise ModelError(f"{name}: tensor {entry.name!r} and {before} {fault}; download the file again")
        covered, before = entry.end, f"tensor {entry.name!r}"
    if covered != file_bytes:
        fault = "is cut short" if covered > file_bytes else "goes on"
        raise ModelError(
            f"{name}: expected {covered} bytes according to its header, but the file {fault} "
            f"at {min(covered, file_bytes)} of {file_bytes} bytes; download it again"
        )
