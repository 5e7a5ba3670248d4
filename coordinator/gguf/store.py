"""Which folder a GGUF file became, or becomes now.

Owns the names of the folders on the shelf (`coordinator.gguf.shelf`): a model is called by the content of the file that
it was made of, so that a file which is moved, touched or downloaded again is not converted again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster import __version__
from cluster.errors import ModelError
from cluster.models.card import CONVERSIONS_FILE, printable
from cluster.models.facts import read_facts
from cluster.models.hashing import CountProgress, counting, hash_file
from cluster.models.manifest import is_small_model_file
from coordinator.gguf.convert import convert
from coordinator.gguf.layout import Layout, lay_out
from coordinator.gguf.shelf import ConversionShelf
from coordinator.gguf.source import GgufFiles, open_gguf
from coordinator.gguf.tokenizer import tokenizer_files

_FORM: Final = 1
"""Raised whenever the same file would become something else; what was converted before is then converted again."""

_HASHES = "hashes"


@dataclass(frozen=True, slots=True)
class ConversionStore:
    """All converted models of one coordinator; `folder` need not exist yet. What is converted now makes room for itself
    within `limit_bytes`, or a share of the disk."""

    folder: Path
    limit_bytes: int | None = None

    @property
    def shelf(self) -> ConversionShelf:
        return ConversionShelf(self.folder, self.limit_bytes)

    def find(self, path: Path) -> Path | None:
        """The folder that the file at `path` became; None when it was not converted yet."""
        files = open_gguf(path)
        target = self._target(files, None)[0]
        return target if target.is_dir() else None

    def use(self, path: Path, progress: CountProgress | None = None, cancelled: threading.Event | None = None) -> Path:
        """What `make` gives, and nobody removes it before this process ends."""
        while not self.shelf.use(folder := self.make(path, progress, cancelled)):
            pass  # somebody has just made room
        self.shelf.sweep()
        return folder

    def make(self, path: Path, progress: CountProgress | None = None, cancelled: threading.Event | None = None) -> Path:
        """The folder that the file at `path` becomes, now if it was not converted yet. Whatever is not converted is
        refused before the long work begins."""
        files = open_gguf(path)
        layout = lay_out(files)
        read_facts(layout.checkpoint())
        small = dict(tokenizer_files(files.facts))
        read_bytes = sum(part.stat().st_size for part in files.paths)
        total_bytes = read_bytes + layout.size_bytes
        done_bytes = [0]

        def on_progress(done: int, _: int) -> None:
            if progress is not None:
                progress(done_bytes[0] + done, total_bytes)

        target, hashes = self._target(files, on_progress)
        if target.is_dir():
            return target
        done_bytes[0] = read_bytes
        small |= _provenance(files, layout, hashes)
        with self.shelf.alone():
            if not target.is_dir():
                self.shelf.make_room(target, layout.size_bytes)
                convert(layout, small, target, on_progress, cancelled)
        return target

    def _target(self, files: GgufFiles, progress: CountProgress | None) -> tuple[Path, dict[str, str]]:
        """Where the model of these files lies, and the SHA-256 of each file. Both are remembered."""
        try:
            sizes = {part: part.stat().st_size for part in files.paths}
            advance = counting(sum(sizes.values()), progress)
            hashes = {
                part.name: hash_file(part, [(0, size)], self.folder / _HASHES, advance)[0, size]
                for part, size in sizes.items()
            }
        except OSError as error:
            raise ModelError(f"{files.paths[0]}: cannot be read ({error.strerror}); check its permissions") from error
        content = json.dumps([_FORM, list(hashes.values())])
        return self.folder / f"{files.name[:100]}-{hashlib.sha256(content.encode()).hexdigest()[:16]}", hashes


def _provenance(files: GgufFiles, layout: Layout, hashes: dict[str, str]) -> dict[str, bytes]:
    """For people, and for whoever asks where the model came from."""
    made = [f"converted from GGUF by Potluck {__version__}"]
    lines = [*made, *(f"SHA-256 {digest}: {name}" for name, digest in hashes.items()), *layout.notes()]
    licence = printable(files.facts.text("general.license.name", "") or files.facts.text("general.license", ""))
    front = f"---\nlicense: {licence}\n---\n" if licence else ""
    card = front + "\n".join([f"# {printable(files.facts.text('general.name', files.name))}", "", *lines, ""])
    record = {CONVERSIONS_FILE: json.dumps({"conversions": lines}, indent=1).encode(), "README.md": card.encode()}
    # Nodes compute with neither of them, so neither is part of what travels or of the model's id.
    assert not any(is_small_model_file(name) for name in record)
    return record
