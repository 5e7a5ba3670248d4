"""All models that were made of GGUF files: which take how much disk, who uses them, and which go when room is needed.

Owns one folder below the coordinator's state, the limit of what it may hold, and the order in which models go. Which
file became which folder is `coordinator.gguf.store`'s business.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.errors import ModelError
from cluster.quantities import format_bytes
from coordinator.gguf.convert import MARGIN_BYTES

_log = logging.getLogger(__name__)

_LIMIT_SHARE: Final = 0.8
"""Of the disk's size, unless a limit is given: as for what nodes fetch."""

_FOLDER = re.compile(r"(?P<name>.+)-[0-9a-f]{16}(?P<unfinished>\.part)?")

_USED, _LOCK, _GONE = "used", "lock", ".gone"

_in_use: dict[Path, int] = {}
"""The marks that this process has locked. The kernel unlocks them when it ends, however it ends."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A folder of the shelf."""

    folder: Path
    name: str  # of the file that it was made of
    size_bytes: int
    is_whole: bool  # else the next start goes on with it
    last_used_ns: int


@dataclass(frozen=True, slots=True)
class ConversionShelf:
    """All converted models of one coordinator; `folder` need not exist yet."""

    folder: Path
    limit_bytes: int | None = None

    def everything(self) -> tuple[Conversion, ...]:
        """What takes disk here, by name."""
        try:
            names = sorted(path.name for path in self.folder.iterdir())
        except OSError:
            return ()
        found = []
        for name in names:
            folder = self.folder / name
            if (match := _FOLDER.fullmatch(name)) and folder.is_dir():
                sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
                mark = folder / _USED
                used_ns = (mark if mark.exists() else folder).stat().st_mtime_ns
                found.append(Conversion(folder, match["name"], sum(sizes), match["unfinished"] is None, used_ns))
        return tuple(found)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
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

    def use(self, folder: Path) -> bool:
        """Remember that the model is used now, and let nobody remove it until this process ends. False when it is not
        there any more."""
        if folder in _in_use:
            os.utime(_in_use[folder])
            return True
        try:
            descriptor = os.open(folder / _USED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for whoever removes it
        if not folder.is_dir():
            os.close(descriptor)
            return False
        os.utime(descriptor)
        _in_use[folder] = descriptor
        return True

    def remove(self, conversion: Conversion) -> bool:
        """Remove a model, unless a process uses it. Whoever calls this is alone."""
        try:
            descriptor = os.open(conversion.folder / _USED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return True  # it has gone already
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = conversion.folder.with_name(f"{conversion.folder.name}{_GONE}")
            os.replace(conversion.folder, gone)  # at once, for whoever is about to use it
            shutil.rmtree(gone)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def make_room(self, target: Path, size_bytes: int) -> None:
        """Make a model of so many bytes fit in `target`, within the limit and on the disk. Others go, the one used
        longest ago first; what an earlier try left of this one stays."""
        limit_bytes = self._limit_bytes()
        if size_bytes > limit_bytes:
            raise ModelError(
                f"the converted model takes {format_bytes(size_bytes)}, but at most {format_bytes(limit_bytes)} may "
                f"lie in {self.folder}. Start with a higher --weights-max, or with --state on a larger disk"
            )
        for leftover in self.folder.glob(f"*{_GONE}"):
            shutil.rmtree(leftover, ignore_errors=True)
        own = (target, target.with_name(f"{target.name}.part"))
        others = sorted((c for c in self.everything() if c.folder not in own), key=lambda c: c.last_used_ns)
        held_bytes = sum(other.size_bytes for other in others)
        begun_bytes = sum(c.size_bytes for c in self.everything() if c.folder in own)
        for other in others:
            is_over_limit = held_bytes + size_bytes > limit_bytes
            missing_bytes = size_bytes - begun_bytes + MARGIN_BYTES - shutil.disk_usage(self.folder).free
            if not is_over_limit and missing_bytes <= 0:
                return
            if self.remove(other):
                _log.warning("removing %s from %s to make room", other.folder.name, self.folder)
                held_bytes -= other.size_bytes
        if held_bytes + size_bytes > limit_bytes:
            raise ModelError(
                f"the converted model takes {format_bytes(size_bytes)}, and {format_bytes(held_bytes)} in "
                f"{self.folder} are in use; together they may take {format_bytes(limit_bytes)}. Stop who uses them, or "
                "start with a higher --weights-max"
            )

    def _limit_bytes(self) -> int:
        if self.limit_bytes is not None:
            return self.limit_bytes
        return int(shutil.disk_usage(self.folder).total * _LIMIT_SHARE)
