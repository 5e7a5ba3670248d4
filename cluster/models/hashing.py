"""SHA-256 of byte spans of files, each byte read once, remembered for as long as the file does not change.

Knows files and offsets, nothing of tensors, manifests or networks. A whole file is the span (0, its size).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ModelError
from cluster.quantities import MIB

Span = tuple[int, int]
"""Bytes [begin, end) of a file."""

Advance = Callable[[int], None]
"""Told how many more bytes are done; called from whichever thread does the work."""

CountProgress = Callable[[int, int], None]
"""(done bytes, total bytes); called from any thread, one at a time."""

READ_BYTES = 4 * MIB
"""One read. Larger does not hash faster; it only holds more memory."""

HASH_THREADS = min(4, os.cpu_count() or 1)
"""Files hashed at once; more only makes a disk seek."""

_SETTLED_NS = 2_000_000_000
"""A file changed this recently may change again within the same clock tick, unnoticed: its hashes are not kept."""


@dataclass(frozen=True, slots=True)
class _Identity:
    """What must stay the same for a remembered hash to be believed."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def hash_file(path: Path, spans: Sequence[Span], cache: Path | None, advance: Advance) -> dict[Span, str]:
    """The SHA-256 of each of `spans` (and of nothing else) in lower-case hex.

    The spans must not overlap, except that one may be the whole file. `cache` is a folder of remembered
    hashes. `advance` is told of every byte of the spans' union, remembered or read.
    """
    resolved = path.resolve()
    identity = _Identity.of(resolved.stat())
    known = _remembered(resolved, identity, cache)
    missing = [span for span in spans if span not in known]
    wanted_bytes, missing_bytes = _union_bytes(spans, identity.size), _union_bytes(missing, identity.size)
    if wanted_bytes > missing_bytes:
        advance(wanted_bytes - missing_bytes)
    if missing:
        known |= _read_and_hash(resolved, missing, identity, advance)
        if cache is not None and time.time_ns() - identity.mtime_ns > _SETTLED_NS:
            _remember(resolved, identity, known, cache)
    return {span: known[span] for span in spans}


def remember(path: Path, hashes: Mapping[Span, str], cache: Path) -> None:
    """Note hashes of a file that the caller has just written, hashed on the way and will not write again."""
    resolved = path.resolve()
    identity = _Identity.of(resolved.stat())
    _remember(resolved, identity, {**_remembered(resolved, identity, cache), **hashes}, cache)


def counting(total_bytes: int, progress: CountProgress | None) -> Advance:
    """Add up what several threads have done."""
    done_bytes = 0
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += count
            if progress is not None:
                progress(done_bytes, total_bytes)

    return advance


def _read_and_hash(path: Path, spans: Sequence[Span], identity: _Identity, advance: Advance) -> dict[Span, str]:
    """One pass over the file; the whole file's hash runs in a second thread beside the parts'."""
    whole = (0, identity.size) if (0, identity.size) in spans else None
    whole_hash = hashlib.sha256()
    parts = PartHashes(sorted(span for span in spans if span != whole))
    segments = [whole] if whole is not None else list(parts.spans)
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        if _Identity.of(os.fstat(file.fileno())) != identity:
            raise _changed(path)
        buffer = memoryview(bytearray(min(READ_BYTES, max(1, *(end - begin for begin, end in segments)))))
        for begin, end in segments:
            file.seek(begin)
            offset = begin
            while offset < end:
                count = file.readinto(buffer[: min(len(buffer), end - offset)]) or 0
                if count == 0:
                    raise _changed(path)
                pending: Future[None] | None = None
                if whole is not None:
                    pending = beside.submit(whole_hash.update, buffer[:count])
                parts.feed(offset, buffer[:count])
                if pending is not None:
                    pending.result()  # the next read overwrites the buffer
                offset += count
                advance(count)
        if _Identity.of(os.fstat(file.fileno())) != identity:
            raise _changed(path)
    digests = parts.digests()
    if whole is not None:
        digests[whole] = whole_hash.hexdigest()
    return digests


class PartHashes:
    """Hashes of sorted spans that do not overlap, fed with ascending pieces of the file."""

    def __init__(self, spans: Sequence[Span]) -> None:
        for (_, end), (begin, _) in itertools.pairwise(spans):
            if begin < end:
                raise ValueError(f"spans overlap at byte {begin}")
        self.spans = spans
        self._hashes = [hashlib.sha256() for _ in spans]
        self._first_open = 0

    def feed(self, offset: int, piece: memoryview) -> None:
        piece_end = offset + len(piece)
        for index in range(self._first_open, len(self.spans)):
            begin, end = self.spans[index]
            if begin >= piece_end:
                break
            self._hashes[index].update(piece[max(begin, offset) - offset : min(end, piece_end) - offset])
            if end <= piece_end:
                self._first_open = index + 1

    def digests(self) -> dict[Span, str]:
        return {span: part.hexdigest() for span, part in zip(self.spans, self._hashes, strict=True)}


def _union_bytes(spans: Sequence[Span], size: int) -> int:
    """Spans do not overlap, but for the whole file, which covers all the others."""
    return size if (0, size) in spans else sum(end - begin for begin, end in spans)


def _changed(path: Path) -> ModelError:
    return ModelError(f"{path} changed while it was read; start again once nothing writes to the model's folder")


# -- What is remembered ----------------------------------------------------------------------------------


def _entry(path: Path, cache: Path) -> Path:
    """One small file for each hashed file, named after its path, so that a changed file replaces its own entry."""
    return cache / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:40]}.json"


def _remembered(path: Path, identity: _Identity, cache: Path | None) -> dict[Span, str]:
    if cache is None:
        return {}
    try:
        entry = json.loads(_entry(path, cache).read_bytes())
        found = _Identity(entry["size"], entry["mtime_ns"], entry["inode"])
        return dict(_parse_spans(entry["sha256"])) if entry["path"] == str(path) and found == identity else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # an absent or damaged memory costs one more reading of the file, nothing else


def _parse_spans(hashes: Mapping[str, str]) -> Iterator[tuple[Span, str]]:
    for text, digest in hashes.items():
        begin, end = text.split("-")
        yield (int(begin), int(end)), str(digest)


def _remember(path: Path, identity: _Identity, hashes: Mapping[Span, str], cache: Path) -> None:
    entry = {
        "path": str(path),
        "size": identity.size,
        "mtime_ns": identity.mtime_ns,
        "inode": identity.inode,
        "sha256": {f"{begin}-{end}": digest for (begin, end), digest in hashes.items()},
    }
    # A full or read-only disk must not keep a model from being served: without memory it is read again next time.
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(_entry(path, cache), json.dumps(entry).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never a part; after a power cut too."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:  # interrupted, too: no part of a file stays behind
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
