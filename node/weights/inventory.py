"""What the stores of this machine hold, and whether it is still what it was. For people who look after a disk:
nodes themselves do without. Everything blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ModelError
from cluster.models.hashing import Advance, Span, hash_file
from cluster.models.manifest import Manifest
from node.weights.journal import Journal, Mark, read_journal
from node.weights.shelf import Shelf, allocated_bytes
from node.weights.store import MODEL_ID, Store

_DEPTH_MAX = 3  # below --state: node/models, and node/0/models where one machine runs a node for each device


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model, or the part of it that one store holds."""

    state: Path  # of the node that the store belongs to
    store: Store
    manifest: Manifest | None  # None where it is damaged
    marks: Mapping[str, Mark]
    size_bytes: int  # on disk

    @property
    def complete(self) -> tuple[str, ...]:
        """The tensors that are here whole and were checked."""
        return tuple(mark.name for mark in self.marks.values() if mark.verified)


def stored_models(root: Path) -> tuple[StoredModel, ...]:
    """Everything in every store at or below `root`, the least recently used first in each."""
    found: list[StoredModel] = []
    for models in sorted(path for depth in range(_DEPTH_MAX) for path in root.glob("*/" * depth + "models")):
        if models.is_dir() and not any(MODEL_ID.fullmatch(part) for part in models.parts):
            for store in Shelf(models.parent).stores():
                marks = read_journal(store.root / "journal")
                found.append(StoredModel(models.parent, store, store.manifest(), marks, allocated_bytes(store.root)))
    return tuple(found)


def damaged(model: StoredModel, advance: Advance) -> tuple[str, ...]:
    """The tensors that are not any more what they were when they arrived; a damaged header or small file is named
    as the file. `advance` is told of every byte read."""
    if model.manifest is None:
        return ("manifest.json",)
    expected: dict[str, dict[Span, tuple[str, str]]] = {}
    here = set(model.complete)
    for entry in model.manifest.files:
        if (model.store.folder / entry.name).is_file():
            span = (0, entry.header_bytes or entry.size_bytes)
            expected[entry.name] = {span: (entry.name, entry.header_sha256 or entry.sha256)}
    for tensor in model.manifest.tensors:
        if tensor.name in here and tensor.size_bytes:
            expected.setdefault(tensor.file, {})[tensor.begin, tensor.end] = (tensor.name, tensor.sha256)
    bad: list[str] = []
    for file, spans in expected.items():
        try:
            hashes = hash_file(model.store.folder / file, sorted(spans), None, advance)
        except (OSError, ModelError):
            hashes = {}  # cut short or gone
        bad += [name for span, (name, sha256) in spans.items() if hashes.get(span) != sha256]
    return tuple(bad)


def checked_bytes(model: StoredModel) -> int:
    """What `damaged` will read, roughly: headers and small files are left out."""
    here = set(model.complete)
    return sum(t.size_bytes for t in model.manifest.tensors if t.name in here) if model.manifest else 0


def forget(model: StoredModel, names: tuple[str, ...]) -> None:
    """Have the next load fetch the tensors `names` again. Headers and small files are checked by every load."""
    marks = {name: mark for name, mark in model.marks.items() if name not in names}
    Journal(model.store.root / "journal", marks).close()
