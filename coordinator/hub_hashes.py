"""What a hub announces of its files, and whether bytes are that.

The hub names large files by SHA-256, and small ones by git's id of a blob: SHA-1 of "blob SIZE", a zero byte and the
content. Its library's cache calls blobs by the same names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ModelError
from cluster.models.hashing import READ_BYTES, Advance
from cluster.models.manifest import FileEntry

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_SHA256, _GIT_ID = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. `sha256` and `git_id` are empty and `size_bytes` 0 where the hub does not tell."""

    name: str
    size_bytes: int
    sha256: str
    git_id: str = ""

    @classmethod
    def of(cls, sibling: RepoSibling) -> HubFile:
        """As the hub lists it; some mirrors tell the size only beside the hash, or nowhere."""
        lfs = sibling.lfs
        size_bytes = sibling.size or (lfs.size if lfs else 0)
        git_id = "" if lfs else sibling.blob_id or ""  # of a large file it is that of a pointer to it
        return cls(sibling.rfilename, size_bytes or 0, lfs.sha256 if lfs else "", git_id)

    @property
    def digest(self) -> str:
        """What its bytes are checked by; empty where the hub tells none."""
        return next((digest for digest in (self.sha256, self.git_id) if is_digest(digest)), "")


def is_digest(text: str) -> bool:
    """Whether `text` can be what the hub calls a file by: mirrors call files by other things too."""
    return (_SHA256.fullmatch(text) or _GIT_ID.fullmatch(text)) is not None


def check_names(folder: Path, files: Iterable[FileEntry]) -> None:
    """Refuse a cached model with a weight file that the cache calls by another SHA-256 than it has: whoever downloaded
    it may not have looked."""
    for entry in files:
        blob = (folder / entry.name).resolve()
        if _SHA256.fullmatch(blob.name) and blob.name != entry.sha256:
            raise ModelError(f"{folder / entry.name} is not the file that was published: remove {blob} and start again")


def has_digest(path: Path, digest: str, advance: Advance | None = None) -> bool:
    """Whether the file at `path` is the one that the hub calls `digest`; mirrors may use plain SHA-1 for small ones."""
    if _SHA256.fullmatch(digest):
        hashes = [hashlib.sha256()]
    else:
        git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        hashes = [git, hashlib.sha1(usedforsecurity=False)]
    with path.open("rb", buffering=0) as file:
        while data := file.read(READ_BYTES):
            for found in hashes:
                found.update(data)
            if advance is not None:
                advance(len(data))
    return digest in {found.hexdigest() for found in hashes}
