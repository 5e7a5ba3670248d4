"""Files that huggingface_hub fetches whole into its cache, believed once they are what the hub announced.

The library compares sizes only. A file that a disk or a line has changed is fetched a second time, and never stays.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

# The module does not declare what it re-exports; TransportError is httpx's or httpx2's, whichever the library uses.
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

from cluster.errors import ModelError
from coordinator.hub_hashes import HubFile, has_digest


def fetch_whole(repository: str, file: HubFile, commit: str) -> Path:
    """The file in the cache's snapshot of `commit`. Without an announced hash it is taken as it came."""
    try:
        return _fetch_once(repository, file, commit)
    except HfHubHTTPError:
        raise  # the library has been patient already
    except (_Unusable, TransportError):
        pass  # it gives up at once when a connection is reset
    try:
        return _fetch_once(repository, file, commit)
    except _Unusable as error:
        kind = "SHA-256" if file.digest == file.sha256 else "git id"
        raise ModelError(
            f"{file.name} of {repository} arrived twice with another {kind} than {constants.ENDPOINT} announced "
            f"({file.digest[:12]}); try again later, or check whether a proxy changes downloads"
        ) from error


class _Unusable(Exception):
    """Other bytes than announced came; they are gone already."""


def _fetch_once(repository: str, file: HubFile, commit: str) -> Path:
    pointer = Path(hf_hub_download(repository, file.name, revision=commit))
    if file.digest and not has_digest(pointer, file.digest):
        blob = pointer.parent / pointer.readlink() if pointer.is_symlink() else pointer
        blob.unlink(missing_ok=True)
        pointer.unlink(missing_ok=True)
        raise _Unusable
    return pointer
