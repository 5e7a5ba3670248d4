"""A model's place on this node's disk: files of the original names and sizes, real only where they were fetched.

    <state>/models/<model id>/manifest.json   what the model consists of
    <state>/models/<model id>/journal         which tensors are here (node.weights.journal)
    <state>/models/<model id>/files/          sparse files that an engine opens like any checkpoint
    <state>/models/<model id>/used            empty; its time is that of the last use
    <state>/models/<model id>/in-place        a folder elsewhere that is used as it is, instead of files/

Owns the layout and every write to it. Knows nothing of layers or of where bytes come from. The node's state is
locked, so one process at a time writes here. All functions block: call them in a thread.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster.errors import WireError
from cluster.models.hashing import READ_BYTES, write_atomically
from cluster.models.manifest import FileEntry, Manifest, TensorRecord, from_json
from cluster.types import ModelId
from node.weights.disk import sync, writing
from node.weights.journal import Journal, Mark, read_journal

MODEL_ID = re.compile(r"[0-9a-f]{64}")


class Store:
    """One model on disk. `open` first; then `journal` says what is here."""

    def __init__(self, models: Path, model: ModelId) -> None:
        if MODEL_ID.fullmatch(model) is None:  # it becomes a path
            raise WireError(f"expected a model id of 64 hex digits, found {model!r:.80}")
        self.model = model
        self.root = models / model
        self.folder = self.root / "files"
        self.journal: Journal
        self._read_marks: Mapping[str, Mark] | None = None

    def manifest(self) -> Manifest | None:
        try:
            return from_json((self.root / "manifest.json").read_bytes(), self.model)
        except (OSError, WireError):
            return None  # absent or damaged: it is fetched again

    def label(self) -> str:
        """What people call this model."""
        manifest = self.manifest()
        return f"{manifest.name} ({self.model[:12]})" if manifest else self.model[:12]

    def save_manifest(self, data: bytes) -> None:
        with writing(self.folder):
            self.root.mkdir(parents=True, exist_ok=True)
            write_atomically(self.root / "manifest.json", data)

    def open(self, manifest: Manifest) -> None:
        """Create what does not exist yet, and forget tensors whose file was deleted or damaged from outside."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.root / "in-place").unlink(missing_ok=True)
            intact = {entry.name for entry in manifest.files if self._size(entry) == entry.size_bytes}
            for entry in manifest.files:
                if entry.header_bytes and entry.name not in intact:
                    with (self.folder / entry.name).open("wb") as file:
                        file.truncate(entry.size_bytes)  # all hole: takes no room
            sizes = {tensor.name: tensor.size_bytes for tensor in manifest.tensors if tensor.file in intact}
            marks = read_journal(self.root / "journal")
            kept = {name: mark for name, mark in marks.items() if mark.received_bytes <= sizes.get(name, -1)}
            self.journal = Journal(self.root / "journal", kept)

    def close(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()

    def touch(self) -> None:
        """Remember that the model is used now."""
        with writing(self.folder):
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / "used").touch()

    def note_in_place(self, folder: Path) -> None:
        """Remember that `folder` was used as it is, so that nothing of the model needs to lie here."""
        with writing(self.root):
            write_atomically(self.root / "in-place", os.fsencode(folder))

    def in_place(self) -> Path | None:
        try:
            return Path(os.fsdecode((self.root / "in-place").read_bytes()))
        except OSError:
            return None

    def last_used_ns(self) -> int:
        try:
            return (self.root / "used").stat().st_mtime_ns
        except OSError:
            return 0

    def delete(self) -> None:
        """Remove everything. The manifest goes first: without it the rest counts for nothing after a kill."""
        with writing(self.folder):
            (self.root / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(self.root, ignore_errors=True)

    def keep_only(self, wanted: Iterable[TensorRecord]) -> None:
        """Free the room of all tensors but the `wanted`, by copying these into new files: file systems differ in
        how a hole is made afterwards, but each makes one where nothing is written."""
        kept: dict[str, list[TensorRecord]] = defaultdict(list)
        for tensor in wanted:
            kept[tensor.file].append(tensor)
        names = {tensor.name for tensors in kept.values() for tensor in tensors}
        dropped = [name for name, mark in self.journal.marks.items() if name not in names and mark.received_bytes > 0]
        manifest = self.manifest()
        if not dropped or manifest is None:
            return
        with writing(self.folder):
            self.journal.append(Mark(name, 0, verified=False) for name in dropped)  # before their bytes are gone
            gone = set(dropped)
            for entry in manifest.files:
                if any(tensor.file == entry.name and tensor.name in gone for tensor in manifest.tensors):
                    self._rewrite(entry, kept[entry.name])

    def _rewrite(self, entry: FileEntry, tensors: list[TensorRecord]) -> None:
        path = self.folder / entry.name
        temporary = path.with_name(f".{path.name}.new")
        spans = [(0, entry.header_bytes), *((t.begin, t.begin + self.received_bytes(t)) for t in tensors)]
        with path.open("rb") as old, temporary.open("wb") as new:
            new.truncate(entry.size_bytes)
            for begin, end in spans:
                old.seek(begin)
                new.seek(begin)
                while (left := end - old.tell()) > 0 and (data := old.read(min(READ_BYTES, left))):
                    new.write(data)
            new.flush()
            sync(new.fileno())
        temporary.replace(path)

    def unwanted_bytes(self, wanted: Iterable[TensorRecord]) -> int:
        """What `keep_only` would free."""
        names = {tensor.name for tensor in wanted}
        return sum(mark.received_bytes for name, mark in self.marks().items() if name not in names)

    def marks(self) -> Mapping[str, Mark]:
        """What is here; before `open`, what the journal said when it was first asked."""
        if hasattr(self, "journal"):
            return self.journal.marks
        if self._read_marks is None:
            self._read_marks = read_journal(self.root / "journal")
        return self._read_marks

    def received_bytes(self, tensor: TensorRecord) -> int:
        mark = self.marks().get(tensor.name)
        return mark.received_bytes if mark else 0

    def is_verified(self, tensor: TensorRecord) -> bool:
        mark = self.marks().get(tensor.name)
        return tensor.size_bytes == 0 or (mark is not None and mark.verified)

    def has_whole(self, entry: FileEntry) -> bool:
        """Whether a small file is here and right."""
        return self._size(entry) == entry.size_bytes and self._hash(entry, entry.size_bytes) == entry.sha256

    def has_header(self, entry: FileEntry) -> bool:
        return self._hash(entry, entry.header_bytes) == entry.header_sha256

    def put_whole(self, entry: FileEntry, data: bytes) -> None:
        with writing(self.folder):
            write_atomically(self.folder / entry.name, data)

    def put_header(self, entry: FileEntry, data: bytes) -> None:
        with writing(self.folder), (self.folder / entry.name).open("r+b") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())

    def _size(self, entry: FileEntry) -> int:
        path = self.folder / entry.name
        return path.stat().st_size if path.is_file() else -1

    def _hash(self, entry: FileEntry, count: int) -> str:
        try:
            with (self.folder / entry.name).open("rb") as file:
                return hashlib.sha256(file.read(count)).hexdigest()
        except FileNotFoundError:
            return ""
