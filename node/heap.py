"""Giving freed memory back to the system.

The C library keeps what is freed between pieces that stay, for whoever asks next; a load that makes small things out of
large ones leaves holes all over, which count as the process' memory though nobody uses them.
"""

from __future__ import annotations

import ctypes
from typing import Final

from cluster.quantities import MIB

_EVERY_BYTES: Final = 8 * MIB
"""Of new memory: rarely enough to cost nothing, often enough that the holes stay small beside any budget."""


class Heap:
    """Counts what was made, and from time to time gives back what was freed meanwhile."""

    def __init__(self) -> None:
        # glibc alone has it; elsewhere freed pages go back by themselves.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._made_bytes = 0

    def made(self, size_bytes: int) -> None:
        self._made_bytes += size_bytes
        if self._made_bytes >= _EVERY_BYTES:
            self.give_back()

    def give_back(self) -> None:
        self._made_bytes = 0
        if self._trim is not None:
            self._trim(0)
