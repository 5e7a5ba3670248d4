"""Control groups with a limit of memory, of either version of the kernel's interface. They need root."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited_group(limit_bytes: int) -> Iterator[Path]:
    """A group whose processes are killed beyond `limit_bytes`, removed by name afterwards. OSError where none can be
    made: then its controller is not on."""
    is_first = (_V1 / "memory.limit_in_bytes").exists()
    group = (_V1 if is_first else _V2) / f"potluck-{secrets.token_hex(4)}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(str(limit_bytes))
        # Else a machine with swap would put away what goes beyond. Not every kernel counts it.
        swap = group / ("memory.memsw.limit_in_bytes" if is_first else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit_bytes if is_first else 0))
        yield group
    finally:
        group.rmdir()
