"""A model as GGUF files hold it: one file, or a set that a splitter made of it.

Owns: which files belong together, and typed access to what they say. Knows no architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster.errors import ModelError
from cluster.models.gguf_header import GgufTensor, Value, read_gguf_header
from cluster.models.gguf_types import GgmlType
from coordinator.gguf.blocks import Bytes, numbers

SUFFIX = ".gguf"

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PARTS_MAX = 1 << 10
_VECTOR_VALUES_MAX = 1 << 16  # factors of a rotation: half a head


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """The files of one model, in order, and what they hold together."""

    name: str  # without the suffix
    paths: tuple[Path, ...]
    facts: Metadata
    tensors: Mapping[str, tuple[Path, GgufTensor]]

    def vector(self, name: str) -> tuple[float, ...] | None:
        """The numbers of a small tensor; None when there is none of that name."""
        if name not in self.tensors:
            return None
        path, tensor = self.tensors[name]
        if len(tensor.shape) != 1 or tensor.shape[0] > _VECTOR_VALUES_MAX or tensor.type is not GgmlType.F32:
            raise ModelError(f"{path}: expected {name} to be a short list of F32, found {list(tensor.shape)}")
        rows: Bytes = np.frombuffer(read_bytes(path, tensor.begin, tensor.end), np.uint8).reshape(1, -1)
        return tuple(float(number) for number in numbers(tensor.type, rows)[0])


@dataclass(slots=True)
class Metadata:
    """Metadata by key, checked on the way out. It remembers what was asked for: what nobody read may matter."""

    values: Mapping[str, Value]
    where: str
    _read: set[str] = field(default_factory=set)

    def integer(self, key: str, default: int | None = None, *, least: int = 0, most: int | None = None) -> int:
        return self._whole(key, self._get(key, default), least, most)

    def same(self, key: str, default: int | None = None, *, least: int = 0) -> int:
        """A number that may also be a list with one for each layer, all alike."""
        found = self._get(key, default)
        if isinstance(found, tuple):
            if len(set(found)) != 1:
                raise self._expected(key, "the same number for all layers, which Potluck needs", found)
            found = found[0]
        return self._whole(key, found, least, None)

    def number(self, key: str, default: float | None = None) -> float:
        """A number as people write it: files hold float32, in which 1e-6 has many digits more."""
        found = self._get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self._expected(key, "a number", found)
        with np.errstate(over="ignore"):  # the next line asks
            single = np.float32(found)
        if not np.isfinite(single):
            raise self._expected(key, "a number that float32 can hold", found)
        return float(str(single))

    def text(self, key: str, default: str | None = None) -> str:
        found = self._get(key, default)
        if not isinstance(found, str):
            raise self._expected(key, "text", found)
        return found

    def flag(self, key: str, default: bool) -> bool:
        found = self._get(key, default)
        if not isinstance(found, bool):
            raise self._expected(key, "true or false", found)
        return found

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        found = self._get(key, default)
        if not isinstance(found, tuple) or not all(isinstance(item, str) for item in found):
            raise self._expected(key, "a list of texts", found)
        return tuple(str(item) for item in found)

    def numbers(self, key: str) -> tuple[float, ...]:
        found = self._get(key, None)
        if not isinstance(found, tuple) or not all(type(item) in (int, float) for item in found):
            raise self._expected(key, "a list of numbers", found)
        return tuple(float(item) for item in found)

    def integers(self, key: str) -> tuple[int, ...]:
        found = self._get(key, None)
        if not isinstance(found, tuple) or not all(type(item) is int for item in found):
            raise self._expected(key, "a list of whole numbers", found)
        return tuple(int(item) for item in found)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def raw(self, key: str) -> Value | None:
        self._read.add(key)
        return self.values.get(key)

    def refuse_unread(self, prefix: str) -> None:
        """A setting of the model that nobody asked for would be ignored; zero and off are what silence means."""
        unread = sorted(key for key in self.values if key.startswith(prefix) and key not in self._read)
        for key in unread:
            if self.values[key]:
                raise ModelError(
                    f"{self.where}: {key} is {self.values[key]!r:.60}, a setting that Potluck does not know; "
                    "use a version of this model in safetensors"
                )

    def _get(self, key: str, default: Value | None) -> Value:
        self._read.add(key)
        found = self.values.get(key, default)
        if found is None:
            raise ModelError(f"{self.where}: expected {key} in its metadata, found none; convert the model again")
        return found

    def _whole(self, key: str, found: Value, least: int, most: int | None) -> int:
        # bool is an int to Python and must not pass for one.
        if type(found) is not int or found < least or (most is not None and found > most):
            end = "" if most is None else f" to {most}"
            raise self._expected(key, f"a whole number from {least}{end}", found)
        return found

    def _expected(self, key: str, what: str, found: Value) -> ModelError:
        return ModelError(f"{self.where}: expected {key} to be {what}, found {found!r:.60}")


def open_gguf(path: Path) -> GgufFiles:
    """Read the headers of the model that the file at `path` is, or is a part of."""
    paths = _parts(path)
    headers = [read_gguf_header(part) for part in paths]
    facts = Metadata(headers[0].metadata, str(paths[0]))
    if (count := facts.integer("split.count", 1)) not in (0, len(paths)):
        raise ModelError(
            f"{path}: is one of {count} files, and their names have to end in -00001-of-{count:05}.gguf and so on; "
            "give them the names that they were published with"
        )
    tensors: dict[str, tuple[Path, GgufTensor]] = {}
    for part, header in zip(paths, headers, strict=True):
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise ModelError(f"both {tensors[name][0]} and {part} hold {name!r}; download the model again")
            tensors[name] = (part, tensor)
    return GgufFiles(model_name(path.name), paths, facts, tensors)


def find_gguf(folder: Path) -> Path | None:
    """The model in a folder of GGUF files: the only file, or the first of the only set. None when there is none."""
    names = sorted(path.name for path in folder.glob(f"*{SUFFIX}") if path.is_file())
    # A projector of pictures lies beside many models; Potluck runs their text part.
    names = [name for name in names if not name.startswith("mmproj")]
    models = {_PART.sub(r"\g<stem>", name): name for name in reversed(names)}
    if len(models) > 1:
        listed = ", ".join(sorted(models.values())[:5])
        raise ModelError(f"{folder} holds {len(models)} models ({listed}); name one of the files")
    return folder / next(iter(models.values())) if models else None


def read_bytes(path: Path, begin: int, end: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(begin)
            found = file.read(end - begin)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if len(found) < end - begin:
        raise ModelError(f"{path} changed while it was read; start again once nothing writes to it")
    return found


def part_names(name: str) -> tuple[str, ...]:
    """The files of the model that the file called `name` is, or is a part of."""
    match = _PART.fullmatch(name)
    if match is None:
        return (name,)
    count = int(match["count"])
    if not 1 <= count <= _PARTS_MAX:
        raise ModelError(f"{name}: a model in {count} files; expected at most {_PARTS_MAX}")
    return tuple(f"{match['stem']}-{number + 1:05}-of-{count:05}{SUFFIX}" for number in range(count))


def check_listed(name: str, names: Iterable[str], where: str) -> None:
    """ModelError unless all files of the model that `name` is of are among `names`."""
    there = set(names)
    if absent := [part for part in part_names(name) if part not in there]:
        others = ", ".join(sorted(other for other in there if other.endswith(SUFFIX))) or f"no {SUFFIX} files"
        raise ModelError(f"{where} has no file {absent[0]}; it has {others}")


def model_name(name: str) -> str:
    """What to call the model of a file: without the suffix, and without the number of a part."""
    return _PART.sub(r"\g<stem>", name).removesuffix(SUFFIX)


def _parts(path: Path) -> tuple[Path, ...]:
    parts = tuple(path.with_name(name) for name in part_names(path.name))
    missing = [part.name for part in parts if not part.is_file()]
    if missing and len(parts) > 1:
        raise ModelError(f"{path.parent}: expected {len(parts)} files of one model, but {missing[0]} is missing")
    return parts
