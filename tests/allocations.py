"""How much memory Python allocates: what reads files that lie must not follow their numbers."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def allocating_at_most(limit_bytes: int) -> Iterator[None]:
    """Fail when the block, whether it raises or not, holds more than that at any moment."""
    tracemalloc.start()
    try:
        yield
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes <= limit_bytes, f"{peak_bytes} bytes were allocated"
