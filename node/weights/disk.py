"""The disk that weights are written to: whether it has room, and what to tell a person when it fails."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ModelError
from cluster.quantities import MIB, format_bytes

MARGIN_SHARE, MARGIN_BYTES_MAX = 0.05, 256 * MIB
"""Kept free beside the weights: a disk filled to the last byte fails other programs, and file systems need some."""

# macOS has no fdatasync.
sync = getattr(os, "fdatasync", os.fsync)


def margin_bytes(needed_bytes: int) -> int:
    return min(int(needed_bytes * MARGIN_SHARE), MARGIN_BYTES_MAX)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def check_room(folder: Path, needed_bytes: int) -> None:
    """ModelError unless `needed_bytes` more fit on the disk of `folder`, with a little left."""
    if needed_bytes == 0:
        return
    free = free_bytes(folder)
    missing_bytes = needed_bytes + margin_bytes(needed_bytes) - free
    if missing_bytes > 0:
        raise ModelError(
            f"the weights of this node's layers need {format_bytes(needed_bytes)} on the disk of {folder}, which has "
            f"{format_bytes(free)} free: {format_bytes(missing_bytes)} too little. Free some space there, "
            "or start this node with --state on a larger disk"
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a disk says into what a person can do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"the disk of {folder} is full. What arrived is kept: free some space and load again, "
                "or start this node with --state on a larger disk"
            ) from error
        raise ModelError(
            f"cannot write weights to {folder}: {error.strerror or error}; check the disk and its permissions, "
            "or start this node with --state elsewhere"
        ) from error
