"""Stores that hold models, or parts of them, without any network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cluster.models.checkpoint import open_checkpoint
from cluster.models.manifest import Manifest, TensorRecord, build_manifest, to_json
from node.weights.ranges import plan_runs
from node.weights.shelf import Shelf
from node.weights.store import Store
from node.weights.writer import RunWriter
from tests.weight_files import write_model


class SourceModel:
    """A model folder elsewhere; `put` copies some of its tensors into a store."""

    def __init__(self, folder: Path, seed: int, tensor_bytes: int, name: str = "") -> None:
        self.folder = write_model(folder, tensor_bytes=tensor_bytes, seed=seed)
        self.manifest: Manifest = build_manifest(
            open_checkpoint(self.folder), name=name or f"m{seed}", revision="r", source="here"
        )

    def put(self, shelf: Shelf, tensors: Sequence[TensorRecord] = (), used_s: int = 0) -> Store:
        store = shelf.store(self.manifest.id)
        store.save_manifest(to_json(self.manifest))
        store.open(self.manifest)
        for entry in self.manifest.files:
            if entry.header_bytes:
                store.put_header(entry, (self.folder / entry.name).read_bytes()[: entry.header_bytes])
        for run in plan_runs(tensors or self.manifest.tensors, {}):
            writer = RunWriter(store, run)
            writer.write((self.folder / run.file).read_bytes()[run.begin : run.end])
            writer.finish()
            writer.close()
        store.touch()
        os.utime(store.root / "used", (used_s, used_s))
        return store
