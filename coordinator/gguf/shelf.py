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

_USED, _LOCK, _GONE = "used", "lock", ".gone"

_FOLDER = re.compile(rf"(?P<name>.+)-[0-9a-f]{{16}}(?P<unfinished>\.part|{re.escape(_GONE)})?")

_in_use: dict[Path, int] = {}
"""The marks that this process has locked. The kernel unlocks them when it ends, however it ends."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A folder of the shelf."""

    folder: Path
    name: str  # of the file that it was made of
    size_bytes: int
    is_whole: bool  # else the next start goes on with it, or with removing it
    last_used_ns: int

    @property
    def is_leftover(self) -> bool:
        """Of a removal that was interrupted."""
        return self.folder.suffix == _GONE


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
        return tuple(found for name in names if (found := _conversion(self.folder / name)) is not None)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Two conversions would write the same files, and fill a disk that had room for one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ModelError(f"cannot write converted models to {self.folder}: {error.strerror}") from error
        try:
            _lock_alone(descriptor, self.folder)
            self._sweep()
            yield
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
        with _claimed(conversion) as is_claimed:
            if is_claimed:
                _remove_claimed(conversion)
            return is_claimed

    def make_room(self, target: Path, size_bytes: int) -> None:
        """Make a model of so many bytes fit in `target`, within the limit and on the disk. Others go, the one used
        longest ago first, but only where that is enough; what an earlier try left of this one stays. Whoever calls this
        is alone."""
        limit_bytes = self._limit_bytes()
        if size_bytes > limit_bytes:
            raise ModelError(
                f"the converted model takes {format_bytes(size_bytes)}, but at most {format_bytes(limit_bytes)} may "
                f"lie in {self.folder}. Use a higher `serve --weights-max`, or --state on a larger disk"
            )
        own = (target, target.with_name(f"{target.name}.part"))
        everything = self.everything()
        others = sorted((c for c in everything if c.folder not in own), key=lambda c: c.last_used_ns)
        begun_bytes = sum(c.size_bytes for c in everything if c.folder in own)
        excess_bytes = sum(other.size_bytes for other in others) + size_bytes - limit_bytes
        free_bytes = shutil.disk_usage(self.folder).free
        missing_bytes = size_bytes - begun_bytes + MARGIN_BYTES - free_bytes
        going: list[Conversion] = []
        going_bytes = 0
        with contextlib.ExitStack() as claims:  # nobody begins to use what is about to go
            for other in others:
                if going_bytes >= max(excess_bytes, missing_bytes):
                    break
                if claims.enter_context(_claimed(other)):
                    going.append(other)
                    going_bytes += other.size_bytes
            if going_bytes < excess_bytes:
                held_bytes = excess_bytes - going_bytes - size_bytes + limit_bytes
                raise ModelError(
                    f"the converted model takes {format_bytes(size_bytes)}, and {format_bytes(held_bytes)} in "
                    f"{self.folder} are in use; together they may take {format_bytes(limit_bytes)}. Stop who uses "
                    "them, or use a higher `serve --weights-max`"
                )
            if going_bytes < missing_bytes:
                raise ModelError(
                    f"the converted model needs {format_bytes(size_bytes - begun_bytes)} on the disk of {self.folder}, "
                    f"which has {format_bytes(free_bytes)} free and would have {format_bytes(going_bytes)} more "
                    "without the models that nobody uses. Free some space there, or use --state on a larger disk"
                )
            for other in going:
                _log.warning("removing %s from %s to make room", other.folder.name, self.folder)
                _remove_claimed(other)

    def sweep(self) -> None:
        """What interrupted removals left goes, unless somebody is at work here: then that one has seen to it."""
        with contextlib.suppress(ModelError), self.alone():
            pass

    def _sweep(self) -> None:
        for leftover in self.everything():
            if leftover.is_leftover:
                shutil.rmtree(leftover.folder, ignore_errors=True)

    def _limit_bytes(self) -> int:
        if self.limit_bytes is not None:
            return self.limit_bytes
        return int(shutil.disk_usage(self.folder).total * _LIMIT_SHARE)


def _conversion(folder: Path) -> Conversion | None:
    match = _FOLDER.fullmatch(folder.name)
    if match is None or not folder.is_dir():
        return None
    try:
        sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
        mark = folder / _USED
        used_ns = (mark if mark.exists() else folder).stat().st_mtime_ns
    except FileNotFoundError:
        return None  # somebody is removing it
    return Conversion(folder, match["name"], sum(sizes), match["unfinished"] is None, used_ns)


def _lock_alone(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            reason = f"another Potluck process is converting or removing a model in {folder}; wait for it"
        else:
            reason = f"cannot lock {folder}: {error.strerror}; use --state on another disk"
        raise ModelError(reason) from error


@contextlib.contextmanager
def _claimed(conversion: Conversion) -> Iterator[bool]:
    """Whether nobody uses the model; then nobody begins to, either."""
    try:
        descriptor = os.open(conversion.folder / _USED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        yield True  # it has gone already
        return
    except OSError as error:
        raise ModelError(f"cannot remove {conversion.folder}: {error.strerror}; check its permissions") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except BlockingIOError:
            is_free = False
        yield is_free
    finally:
        os.close(descriptor)


def _remove_claimed(conversion: Conversion) -> None:
    if conversion.is_leftover:
        return _discard(conversion.folder)
    gone = conversion.folder.with_name(f"{conversion.folder.name}{_GONE}")
    _discard(gone)  # an earlier model of this name, whose removal was interrupted
    try:
        os.replace(conversion.folder, gone)  # at once, for whoever is about to use it
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"cannot remove {conversion.folder}: {error.strerror}; check its permissions") from error
    return _discard(gone)


def _discard(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ModelError(f"cannot remove {folder}: {error.strerror}; check its permissions") from error
