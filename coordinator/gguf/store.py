"""Where converted models lie, and which of them a GGUF file became.

Owns one folder below the coordinator's state, with a folder for each model: called by the content of the file that it
was made of, so that a file which is moved, touched or downloaded again is not converted again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
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
from coordinator.gguf.source import GgufFiles, open_gguf
from coordinator.gguf.tokenizer import tokenizer_files

_FORM: Final = 1
"""Raised whenever the same file would become something else; what was converted before is then converted again."""

_HASHES, _LOCK = "hashes", "lock"

_FOLDER = re.compile(r"(?P<name>.+)-[0-9a-f]{16}(?P<unfinished>\.part)?")


@dataclass(frozen=True, slots=True)
class Conversion:
    """A folder of the store."""

    folder: Path
    name: str  # of the file that it was made of
    size_bytes: int
    is_whole: bool  # else the next start goes on with it


@dataclass(frozen=True, slots=True)
class ConversionStore:
    """All converted models of one coordinator; `folder` need not exist yet."""

    folder: Path

    def find(self, path: Path) -> Path | None:
        """The folder that the file at `path` became; None when it was not converted yet."""
        files = open_gguf(path)
        target = self._target(files, None)[0]
        return target if target.is_dir() else None

    def everything(self) -> tuple[Conversion, ...]:
        """What takes disk here."""
        try:
            names = sorted(path.name for path in self.folder.iterdir())
        except OSError:
            return ()
        found = []
        for name in names:
            if (match := _FOLDER.fullmatch(name)) and (self.folder / name).is_dir():
                sizes = [path.stat().st_size for path in (self.folder / name).iterdir() if path.is_file()]
                found.append(Conversion(self.folder / name, match["name"], sum(sizes), match["unfinished"] is None))
        return tuple(found)

    def remove(self, conversion: Conversion) -> None:
        with self._alone():
            shutil.rmtree(conversion.folder)

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
        with self._alone():
            if not target.is_dir():
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

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two conversions would write the same files, and fill a disk that had room for one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ModelError(f"cannot write converted models to {self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ModelError(f"another Potluck process is converting a model in {self.folder}; wait for it") from error
        finally:
            os.close(descriptor)


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
