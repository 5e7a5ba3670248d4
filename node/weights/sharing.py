"""What this node's disk holds, as a source of weights for other nodes. Hands out checked bytes alone."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from pathlib import Path

from cluster.models.manifest import Manifest, TensorRecord, to_json
from cluster.models.safetensors_header import LENGTH_BYTES
from cluster.types import ModelId
from cluster.weight_service import Holding, WeightService, pack_bits
from node.weights.shelf import Shelf
from node.weights.store import MODEL_ID, Store

_STREAMS_MAX = 16
"""A node's first work is its stage; four others with a few streams each already fill its link."""


def share(shelf: Shelf) -> WeightService:
    """The Weights service of the node whose models lie on `shelf`."""
    return WeightService(_Shared(shelf).find, _STREAMS_MAX)


class _Shared:
    """Remembers what was read of each manifest; what is complete is asked of the store each time."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._known: dict[ModelId, _PartOfModel] = {}

    def find(self, model_id: str) -> Holding | None:
        # A stranger may ask for anything: only what is on the disk is remembered.
        model = ModelId(model_id)
        if MODEL_ID.fullmatch(model_id) is None or not (self._shelf.models / model_id / "files").is_dir():
            self._known.pop(model, None)
            return None
        store = self._shelf.store(model)
        known = self._known.get(model)
        if known is None or known.store is not store:
            manifest = store.manifest()
            if manifest is None:
                return None
            known = self._known[model] = _PartOfModel(store, manifest)
        return known


class _PartOfModel:
    """A Holding of the tensors that a store has verified."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.folder: Path = store.folder
        self.manifest_json = to_json(manifest)
        self._tensors = manifest.tensors
        self._files = {entry.name: entry for entry in manifest.files}
        self._by_file: dict[str, list[TensorRecord]] = defaultdict(list)
        for tensor in sorted(manifest.tensors, key=lambda tensor: (tensor.begin, tensor.end)):
            self._by_file[tensor.file].append(tensor)
        self._begins = {file: [tensor.begin for tensor in tensors] for file, tensors in self._by_file.items()}

    def size_bytes(self, file: str) -> int | None:
        entry = self._files.get(file)
        return entry.size_bytes if entry else None

    def holds(self, file: str, begin: int, end: int) -> bool:
        entry = self._files[file]
        if end <= (entry.header_bytes or entry.size_bytes):
            return self._has_beginning(file)
        index = bisect_right(self._begins.get(file, []), begin) - 1
        position = begin
        for tensor in self._by_file[file][max(index, 0) :]:
            if position >= end:
                break
            if not tensor.begin <= position < tensor.end and tensor.size_bytes:
                return False
            if not self.store.is_verified(tensor):
                return False
            position = max(position, tensor.end)
        return position >= end

    def _has_beginning(self, file: str) -> bool:
        """Small files are written whole. A header begins with its length, which is never zero, as a hole is."""
        try:
            with (self.folder / file).open("rb") as opened:
                return any(opened.read(LENGTH_BYTES))
        except OSError:
            return False

    def tensors(self) -> bytes:
        return pack_bits([self.store.is_verified(tensor) for tensor in self._tensors])
