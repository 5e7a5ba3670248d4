"""Puts arriving tensors where they belong in their file and checks them. Blocks: call it in a thread."""

from __future__ import annotations

import hashlib
import os

from cluster.models.hashing import READ_BYTES
from cluster.models.manifest import TensorRecord
from node.weights.disk import sync, writing
from node.weights.journal import Mark
from node.weights.ranges import Run
from node.weights.store import Store


class RunWriter:
    """Writes a run's tensors into their file, checking each as its last byte arrives."""

    def __init__(self, store: Store, run: Run) -> None:
        self._store = store
        self._tensors = run.tensors
        self._index = 0
        self._position = run.tensors[0].begin
        self._hash = hashlib.sha256()
        self._good: list[TensorRecord] = []
        self.bad: list[TensorRecord] = []
        self._resume_at = run.begin
        with writing(store.folder):
            self._handle = os.open(store.folder / run.file, os.O_RDWR | os.O_CLOEXEC)

    def resume(self) -> None:
        """Read back what the run skips, because it is on the disk: it counts only if it hashes right."""
        with writing(self._store.folder):
            while self._position < self._resume_at:
                data = os.pread(self._handle, min(READ_BYTES, self._resume_at - self._position), self._position)
                if not data:
                    raise OSError(f"{self._tensors[0].file} was cut short")
                self._store.journal.append(self._advance(data))

    def write(self, data: bytes) -> None:
        """Take the next bytes, which end at most where the run ends."""
        with writing(self._store.folder):
            view, offset = memoryview(data), self._position
            while view:
                written = os.pwrite(self._handle, view, offset)
                view, offset = view[written:], offset + written
            self._store.journal.append(self._advance(data))

    def finish(self) -> None:
        """Sync to disk and only then say of the good tensors that they are here."""
        with writing(self._store.folder):
            sync(self._handle)
            self._store.journal.append(Mark(tensor.name, tensor.size_bytes, verified=True) for tensor in self._good)

    def close(self) -> None:
        os.close(self._handle)

    def _advance(self, data: bytes) -> list[Mark]:
        """Hash `data`; returns what is now to be remembered of each tensor that it touches."""
        marks: list[Mark] = []
        view = memoryview(data)
        while view:
            tensor = self._tensors[self._index]
            taken = min(len(view), tensor.end - self._position)
            self._hash.update(view[:taken])
            view, self._position = view[taken:], self._position + taken
            received_bytes = self._position - tensor.begin
            if self._position == tensor.end:
                good = self._hash.hexdigest() == tensor.sha256
                (self._good if good else self.bad).append(tensor)
                received_bytes = tensor.size_bytes if good else 0
                self._index, self._hash = self._index + 1, hashlib.sha256()
            marks.append(Mark(tensor.name, received_bytes, verified=False))
        return marks
