"""What a model on the hub costs, without downloading it: its configuration and the headers of its weight files.

The headers go into files of the right length that hold nothing else, so that the one reader of model folders
(`cluster.models.checkpoint`) checks them like any others.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
)

from cluster.errors import ModelError
from cluster.models.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, open_checkpoint
from cluster.models.safetensors_header import LENGTH_BYTES, header_bytes
from coordinator.hub_download import explained, find_cached, list_files, weights_of

_FIRST_BYTES = 256 * 1024
"""Holds the headers of nearly all files, so that one request each is enough."""

_TIMEOUT_S = 30.0


def peek(repository: str, revision: str | None) -> Checkpoint:
    """The checkpoint of a model on the hub; its folder holds no weights and is gone already."""
    disable_progress_bars()
    branch = revision or constants.DEFAULT_REVISION
    cached = find_cached(repository, branch)
    if cached is not None:
        return open_checkpoint(cached[0])
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{repository} at {branch} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
            "unset it once to download the model"
        )
    with tempfile.TemporaryDirectory(prefix="potluck-peek-") as scratch, explained(repository, branch):
        folder = Path(scratch)
        commit, files = list_files(repository, branch)
        small = [name for name in (CONFIG_FILE, INDEX_FILE) if name in files]
        for name in small:
            (folder / name).write_bytes(Path(hf_hub_download(repository, name, revision=commit)).read_bytes())
        for name in weights_of(set(files), folder):
            _write_hollow(folder / name, hf_hub_url(repository, name, revision=commit), files[name].size_bytes)
        return open_checkpoint(folder)


def _write_hollow(path: Path, url: str, size_bytes: int) -> None:
    """A sparse file of the weight file's length that begins with its header."""
    head = _read(url, min(_FIRST_BYTES, size_bytes))
    needed = LENGTH_BYTES + header_bytes(head[:LENGTH_BYTES], size_bytes, path.name)
    if needed > len(head):
        head = _read(url, needed)
    path.write_bytes(head[:needed])
    os.truncate(path, size_bytes)


def _read(url: str, count: int) -> bytes:
    """The first `count` bytes; a server that knows no ranges is cut off there."""
    headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes=0-{count - 1}"}
    data = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes():
            data += piece
            if len(data) >= count:
                break
    if len(data) < count:
        raise ModelError(f"{url} ended after {len(data)} bytes; {count} were asked for. Try again")
    return bytes(data[:count])
