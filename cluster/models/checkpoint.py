"""A model's folder: its configuration and where each of its tensors lies.

Owns: which files count and that they agree with each other. Reads headers only. Knows nothing of what a tensor
is for (`cluster.models.layout`) or what the configuration means (`cluster.models.facts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ModelError
from cluster.limits import CONFIG_BYTES_MAX, INDEX_BYTES_MAX
from cluster.models.safetensors_header import read_header
from cluster.models.strict_json import read_object
from cluster.types import DType

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor at rest. `file` is a name within the folder; offsets are absolute in that file, half-open."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose headers have been read and agree."""

    folder: Path
    config: Mapping[str, object]
    tensors: Mapping[str, StoredTensor]

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files, sorted. A file without tensors does not count."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the configuration and every header in `folder`.

    The weights are `model.safetensors`, else what `model.safetensors.index.json` lists, else all `*.safetensors`.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: expected a model's folder, found {'a file' if folder.exists() else 'nothing'}")
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise ModelError(f"{folder}: expected {CONFIG_FILE} in a model's folder, found none; is this the right folder?")
    config = read_object(config_path, CONFIG_BYTES_MAX)
    weight_map = None if (folder / SINGLE_FILE).is_file() else _read_index(folder)
    files = _plain_files(folder) if weight_map is None else tuple(sorted(set(weight_map.values())))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: {INDEX_FILE} lists {', '.join(missing)}, not found; download the model again")
    tensors = _read_tensors(folder, files)
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise ModelError(f"{folder}: {INDEX_FILE} says that {file} holds {name!r}, but it does not; download again")
    return Checkpoint(folder, config, tensors)


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    weight_map = read_object(path, INDEX_BYTES_MAX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: expected weight_map from tensor names to files, found none; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise ModelError(
                f"{path}: expected a .safetensors file in this folder for {name!r:.80}, found {file!r:.80}"
            )
    return weight_map


def _is_plain_name(file: str) -> bool:
    """Whether `file` can only mean a weight file directly in the model's folder."""
    return file.isprintable() and file.endswith(".safetensors") and file[0] != "." and not set(file) & set('/\\:"<>|?*')


def _plain_files(folder: Path) -> tuple[str, ...]:
    if (folder / SINGLE_FILE).is_file():
        return (SINGLE_FILE,)
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if not names:
        others = any(path.suffix in {".bin", ".pt", ".pth", ".gguf"} for path in folder.iterdir())
        found = (
            "weights in another format; Potluck reads safetensors, and GGUF files by name" if others else "no weights"
        )
        raise ModelError(f"{folder}: expected {SINGLE_FILE}, found {found}")
    for name in names:
        if not _is_plain_name(name):
            raise ModelError(f"{folder}: expected plain file names, found {name!r}; rename or remove it")
    return tuple(names)


def _read_tensors(folder: Path, files: tuple[str, ...]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for entry in read_header(folder / file).values():
            if entry.name in tensors:
                other = tensors[entry.name].file
                raise ModelError(f"{folder}: both {other} and {file} hold {entry.name!r}; remove the wrong one")
            tensors[entry.name] = StoredTensor(entry.name, entry.dtype, entry.shape, file, entry.begin, entry.end)
    if not tensors:
        raise ModelError(f"{folder}: expected tensors in {', '.join(files)}, found none; download the model again")
    return tensors
