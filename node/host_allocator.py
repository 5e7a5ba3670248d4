"""How the C library treats memory that an engine frees on the processor.

Owns: one setting of glibc's allocator. By default it raises its own threshold with what is freed, keeps blocks of up to
32 MiB in its heap for reuse, and so a process stays far larger than what it holds: 230 MiB where 120 were in use, after
a prefill of 2,048 tokens through a model of 150 MiB. A memory budget is a promise about the process, not about what it
counts itself. Knows no engine.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

from cluster.quantities import MIB

_M_MMAP_THRESHOLD: Final = -3  # <malloc.h>

MAPPED_FROM_BYTES: Final = 1 * MIB
"""Blocks from this size on are mapped alone and unmapped when they are freed. A decode step of one row makes none."""


def give_back_when_freed(from_bytes: int = MAPPED_FROM_BYTES) -> None:
    """Let large blocks go back to the system at once, from now on and in this whole process. Where the C library is
    not glibc, it does as it did."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, from_bytes)
