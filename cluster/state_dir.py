"""The folder in which one node or coordinator keeps what must survive a restart, and its lock.

Owns the folder's place, its mode and the lock that keeps two processes from sharing one identity. Does not
know what is kept inside.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cluster.errors import UsageError

HOME_VARIABLE: Final = "POTLUCK_HOME"
_LOCK_NAME: Final = "lock"


def default_state_path(environ: Mapping[str, str] | None = None) -> Path:
    """Where `--state` points unless it is given: POTLUCK_HOME, else ~/.potluck."""
    chosen = (os.environ if environ is None else environ).get(HOME_VARIABLE, "").strip()
    return Path(chosen).expanduser() if chosen else Path.home() / ".potluck"


class StateDir:
    """A state folder that this process holds alone, from creation to `close()` or the end of the process.

    The lock belongs to the open file, so the kernel frees it when the process dies, however it dies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        _create_private(self.path)
        self._lock_fd = _open_lock(self.path / _LOCK_NAME)
        try:
            _take_lock(self._lock_fd, self.path)
        except BaseException:  # nobody has this object, so nobody else would close it
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        """Let another process have the folder. The lock file stays: removing it would race with the next holder."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def holder_pid(path: Path) -> int | None:
    """The process that holds this state folder now, 0 if it is held by one that left no number, None if free."""
    try:
        fd = os.open(path.expanduser() / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_pid(fd) or 0
    except OSError:
        return None
    else:
        return None
    finally:
        os.close(fd)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file atomically, readable by its owner alone from its first byte on."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UsageError(
            f"cannot write {path}: {error.strerror}; free some room or choose another folder with --state DIR"
        ) from error


def _create_private(path: Path) -> None:
    """Make the folder with mode 0700. One that exists keeps its mode: it may be the person's own, such as /srv."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    except OSError as error:
        raise _unusable(path, error) from error
    if not path.is_dir():
        raise UsageError(f"expected a folder for state, found a file: {path}; choose another with --state DIR")


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path.parent, error) from error


def _take_lock(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        raise UsageError(
            f"another Potluck process (pid {_read_pid(fd) or 'unknown'}) uses {folder}; "
            "use --state DIR for a second node on this machine"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOLCK:
            raise UsageError(
                f"the file system of {folder} has no locks; choose a folder on a local disk with --state DIR"
            ) from error
        raise _unusable(folder, error) from error


def _read_pid(fd: int) -> int | None:
    """What the holder wrote; None while it has not written yet."""
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _unusable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot use {path} for state: {error.strerror}; choose a writable folder with --state DIR")
