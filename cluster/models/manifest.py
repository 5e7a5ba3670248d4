"""A model as a list of what it consists of: files and tensors, each with its size and SHA-256.

A manifest lets a machine that has none of a model's files fetch exactly the bytes of its layers and know that
they are the right ones. Its id is a hash of that list, so the same bytes have the same id wherever they lie and
whatever they are called, and one id vouches for everything else. Knows nothing of networks or of who needs what.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from cluster.errors import ModelError, WireError
from cluster.fields import Fields
from cluster.limits import MANIFEST_BYTES_MAX, SAFETENSORS_HEADER_BYTES_MAX
from cluster.models.card import CONVERSIONS_MAX, read_conversions, read_licence
from cluster.models.checkpoint import Checkpoint, StoredTensor
from cluster.models.hashing import HASH_THREADS, Advance, CountProgress, Span, counting, hash_file
from cluster.models.safetensors_header import LENGTH_BYTES, header_bytes
from cluster.types import DType, ModelId

_FORMAT = 1
_SIZE_MAX = 1 << 50  # one PiB: far above any model, far below where arithmetic elsewhere would overflow
_NAME_CHARS_MAX = 512
_ITEMS_MAX = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")

_SMALL_FILES = (
    "config.json", "generation_config.json", "*.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template*", "*.tiktoken", "spiece.model", "sentencepiece*.model",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the model. A safetensors file begins with a header, which every holder of a part of it needs."""

    name: str
    size_bytes: int
    sha256: str
    header_bytes: int = 0  # 0 for files that hold no tensors
    header_sha256: str = ""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where a tensor lies, bytes [begin, end) of `file`, and what those bytes must hash to."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int
    sha256: str

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin

    def stored(self) -> StoredTensor:
        return StoredTensor(self.name, self.dtype, self.shape, self.file, self.begin, self.end)


@dataclass(frozen=True, slots=True)
class Manifest:
    """`id` covers the files and tensors alone; what else is here is for people."""

    id: ModelId
    name: str
    revision: str
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorRecord, ...]
    source: str = ""  # a folder, or an address on the hub
    licence: str = ""  # as the model's own files name it
    conversions: tuple[str, ...] = ()  # what was done to what was published

    def file(self, name: str) -> FileEntry | None:
        return next((entry for entry in self.files if entry.name == name), None)


def is_small_model_file(name: str) -> bool:
    """Whether `name` is a file beside the weights that serving needs: configuration, tokenizer, chat template.
    Code is none, whatever it is called."""
    return not name.endswith(".py") and any(fnmatch.fnmatchcase(name, pattern) for pattern in _SMALL_FILES)


# -- Making one ------------------------------------------------------------------------------------------


def build_manifest(
    checkpoint: Checkpoint,
    *,
    name: str,
    revision: str,
    source: str = "",
    cache: Path | None = None,
    progress: CountProgress | None = None,
) -> Manifest:
    """Hash the checkpoint's files, each read once. With `cache` (a folder) unchanged files are not read again."""
    stored: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in checkpoint.tensors.values():
        stored[tensor.file].append(tensor)
    try:
        found = (path.name for path in checkpoint.folder.iterdir() if path.is_file())
        names = sorted({*stored, *(name for name in found if is_small_model_file(name))})
        paths = [checkpoint.folder / name for name in names]
        advance = counting(sum(path.stat().st_size for path in paths), progress)
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            jobs = [threads.submit(_describe, path, stored.get(path.name, []), cache, advance) for path in paths]
            described = [job.result() for job in jobs]
    except OSError as error:
        raise ModelError(f"cannot read the model's files in {checkpoint.folder}: {error}") from error
    manifest = assemble(name, revision, [file for file, _ in described], [t for _, ts in described for t in ts])
    folder = checkpoint.folder
    return replace(manifest, source=source, licence=read_licence(folder), conversions=read_conversions(folder))


def _describe(
    path: Path, stored: Sequence[StoredTensor], cache: Path | None, advance: Advance
) -> tuple[FileEntry, list[TensorRecord]]:
    size = path.stat().st_size
    whole: Span = (0, size)
    if not stored:
        return FileEntry(path.name, size, hash_file(path, [whole], cache, advance)[whole]), []
    with path.open("rb") as file:
        header: Span = (0, LENGTH_BYTES + header_bytes(file.read(LENGTH_BYTES), size, str(path)))
    # Empty tensors share one span, so spans are made unique.
    spans = {whole, header, *((tensor.begin, tensor.end) for tensor in stored)}
    hashes = hash_file(path, sorted(spans), cache, advance)
    entry = FileEntry(path.name, size, hashes[whole], header[1], hashes[header])
    ordered = sorted(stored, key=lambda tensor: (tensor.begin, tensor.end, tensor.name))
    return entry, [
        TensorRecord(t.name, t.dtype, t.shape, t.file, t.begin, t.end, hashes[t.begin, t.end]) for t in ordered
    ]


def assemble(name: str, revision: str, files: Iterable[FileEntry], tensors: Iterable[TensorRecord]) -> Manifest:
    """Give the list its id."""
    file_tuple, tensor_tuple = tuple(files), tuple(tensors)
    content = json.dumps(_content(file_tuple, tensor_tuple), separators=(",", ":")).encode()
    return Manifest(ModelId(hashlib.sha256(content).hexdigest()), name, revision, file_tuple, tensor_tuple)


# -- As JSON ---------------------------------------------------------------------------------------------


def to_json(manifest: Manifest) -> bytes:
    """Arrays, not objects: a hundred thousand tensors repeat no field names."""
    document = [*_content(manifest.files, manifest.tensors), *_for_people(manifest)]
    data = json.dumps(document, separators=(",", ":")).encode()
    if len(data) > MANIFEST_BYTES_MAX:
        raise ModelError(
            f"the manifest of {manifest.name} takes {len(data)} bytes; at most {MANIFEST_BYTES_MAX} travel"
        )
    return data


def from_json(data: bytes, expected: ModelId) -> Manifest:
    """Read a manifest that came from elsewhere. WireError when anything in it is not what it must be, or when it
    is not the manifest of the model `expected`."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise WireError(f"a manifest of {len(data)} bytes; at most {MANIFEST_BYTES_MAX} are read")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the manifest is not JSON: {error}") from error
    fields = Fields(document, "manifest")
    fields.integer(_FORMAT, _FORMAT + 1)
    files = tuple(
        _file_in(Fields(item, f"manifest.file[{i}]")) for i, item in enumerate(fields.items("files", 1 << 16))
    )
    tensors: list[TensorRecord] = []
    by_name = {entry.name: entry for entry in files}
    if len({name.casefold() for name in by_name}) != len(files):
        raise WireError("the manifest names a file twice")  # also where only the case differs: some disks ignore it
    for i, item in enumerate(fields.items("tensors", _ITEMS_MAX)):
        tensors.append(_tensor_in(Fields(item, f"manifest.tensor[{i}]"), files))
    _check_disjoint(tensors, by_name)
    manifest = assemble(fields.text(_NAME_CHARS_MAX), fields.text(_NAME_CHARS_MAX), files, tensors)
    if manifest.id != expected:
        raise WireError(f"expected the manifest of model {expected[:12]}, found that of {manifest.id[:12]}")
    return replace(
        manifest,
        source=fields.text(_NAME_CHARS_MAX),
        licence=fields.text(_NAME_CHARS_MAX),
        conversions=tuple(
            Fields([line], "manifest.conversion").text(_NAME_CHARS_MAX)
            for line in fields.items("conversions", CONVERSIONS_MAX)
        ),
    )


def _content(files: Sequence[FileEntry], tensors: Sequence[TensorRecord]) -> list[object]:
    """What the id covers."""
    number = {entry.name: i for i, entry in enumerate(files)}
    return [
        _FORMAT,
        [[f.name, f.size_bytes, f.sha256, f.header_bytes, f.header_sha256] for f in files],
        [[t.name, t.dtype.value, list(t.shape), number[t.file], t.begin, t.end, t.sha256] for t in tensors],
    ]


def _for_people(manifest: Manifest) -> list[object]:
    """What the id does not cover: the same bytes may have come from two places under two names."""
    texts = (manifest.name, manifest.revision, manifest.source, manifest.licence)
    conversions = [line[:_NAME_CHARS_MAX] for line in manifest.conversions[:CONVERSIONS_MAX]]
    return [*(text[:_NAME_CHARS_MAX] for text in texts), conversions]


def _file_in(fields: Fields) -> FileEntry:
    name, size = fields.text(_NAME_CHARS_MAX), fields.integer(0, _SIZE_MAX)
    # A name becomes a path on the receiving machine.
    if not name or name.startswith(".") or not name.isprintable() or set(name) & set('/\\:*?"<>|'):
        raise WireError(f"the manifest names a file {name!r:.80}; expected a plain file name")
    digest = _sha256_in(fields)
    header_max = min(size, LENGTH_BYTES + SAFETENSORS_HEADER_BYTES_MAX)
    header, header_digest = fields.integer(0, header_max + 1), fields.text(64)
    if (header > 0) != (_SHA256.fullmatch(header_digest) is not None):
        raise WireError(f"the manifest's header of {name} has no valid hash")
    return FileEntry(name, size, digest, header, header_digest)


def _tensor_in(fields: Fields, files: Sequence[FileEntry]) -> TensorRecord:
    name, dtype_text = fields.text(_NAME_CHARS_MAX), fields.text(16)
    dimensions = [Fields([size], f"shape of {name}") for size in fields.items("shape", 16)]
    shape = tuple(dimension.integer(0, _SIZE_MAX) for dimension in dimensions)
    entry = files[fields.integer(0, len(files))]
    begin, end = fields.integer(0, _SIZE_MAX), fields.integer(0, _SIZE_MAX)
    if dtype_text not in DType.__members__.values():
        raise WireError(f"tensor {name} has an unknown element type {dtype_text!r}")
    dtype = DType(dtype_text)
    if entry.header_bytes == 0 or not entry.header_bytes <= begin <= end <= entry.size_bytes:
        raise WireError(f"tensor {name} claims bytes [{begin}, {end}) of {entry.name}, which are not tensor data")
    if end - begin != prod(shape) * dtype.size_bytes:
        raise WireError(f"tensor {name} is {dtype} of shape {shape} but claims {end - begin} bytes")
    return TensorRecord(name, dtype, shape, entry.name, begin, end, _sha256_in(fields))


def _sha256_in(fields: Fields) -> str:
    digest = fields.text(64)
    if _SHA256.fullmatch(digest) is None:
        raise WireError(f"expected a SHA-256 in lower-case hex, found {digest!r}")
    return digest


def _check_disjoint(tensors: Sequence[TensorRecord], files: dict[str, FileEntry]) -> None:
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise WireError("the manifest names a tensor twice")
    reached = {name: entry.header_bytes for name, entry in files.items()}
    for tensor in sorted(tensors, key=lambda tensor: (tensor.file, tensor.begin, tensor.end)):
        if tensor.begin < reached[tensor.file]:
            raise WireError(f"tensor {tensor.name} overlaps another one in {tensor.file}")
        reached[tensor.file] = tensor.end
