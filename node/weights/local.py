"""Whether a folder that this machine sees holds the same model as the coordinator's. Then nothing is copied.

A path proves nothing: two machines of one lab may keep different weights of one shape under the same name. So
the node's own tensors are compared by hash; unchanged files are not hashed twice.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.errors import ModelError
from cluster.models.hashing import HASH_THREADS, Span, hash_file
from cluster.models.manifest import FileEntry, TensorRecord

_log = logging.getLogger(__name__)


def holds_slice(
    folder: Path,
    small: Iterable[FileEntry],
    weights: Sequence[FileEntry],
    owned: Iterable[TensorRecord],
    cache: Path,
    advance: Callable[[int], None],
) -> bool:
    """Whether `folder` has the `small` files, the `weights` files' headers and the `owned` tensors, all right."""
    expected: dict[str, dict[Span, str]] = defaultdict(dict)
    for entry in small:
        expected[entry.name][0, entry.size_bytes] = entry.sha256
    for entry in weights:
        expected[entry.name][0, entry.header_bytes] = entry.header_sha256
    for tensor in owned:
        expected[tensor.file][tensor.begin, tensor.end] = tensor.sha256
    try:
        # Sizes first: they are free and tell most strangers apart.
        differs = next((e.name for e in (*small, *weights) if (folder / e.name).stat().st_size != e.size_bytes), None)
        if differs is None:
            with ThreadPoolExecutor(HASH_THREADS) as threads:
                found = threads.map(
                    lambda name: hash_file(folder / name, list(expected[name]), cache, advance), expected
                )
                differs = next(
                    (name for name, hashes in zip(expected, found, strict=True) if hashes != expected[name]), None
                )
    except (OSError, ModelError) as error:
        _log.info("not using %s: %s", folder, error)
        return False
    if differs is not None:
        _log.info("not using %s: its %s is not the coordinator's", folder, differs)
    return differs is None
