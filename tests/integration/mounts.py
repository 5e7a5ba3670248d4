"""Machines with other disks: private mount namespaces in which folders are empty or small. Needs root, on Linux."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


def hiding(*folders: Path, small: Mapping[Path, int] | None = None) -> list[str]:
    """The words before a command that make `folders` empty for it, and give those in `small` a disk of so many
    bytes. The process's id is the command's own; the mounts vanish with it."""
    mounts = [f"mount -t tmpfs potluck '{folder}'" for folder in folders]
    mounts += [f"mount -t tmpfs -o size={size} potluck '{folder}'" for folder, size in (small or {}).items()]
    script = "\n".join(["set -e", *mounts, 'exec "$@"'])
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


@functools.cache
def _missing() -> str | None:
    if sys.platform != "linux":
        return f"mount namespaces are Linux's; this is {sys.platform}"
    if os.geteuid() != 0:
        return "mount namespaces need root"
    try:
        done = subprocess.run([*hiding(Path("/mnt")), "true"], capture_output=True, text=True, timeout=10, check=False)
    except OSError as error:
        return f"unshare cannot be run: {error}"
    return f"this kernel or container refuses mounts: {done.stderr.strip()}" if done.returncode else None


def require_mounts() -> None:
    """Skip the calling test, with the reason, where nothing can be mounted."""
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
