"""What a model on the hub costs, without downloading it: its configuration and the headers of its weight files.

The headers go into files of the right length that hold nothing else, so that the one reader of model folders
(`cluster.models.checkpoint`) checks them like any others.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
)

from cluster.errors import ModelError
from cluster.models.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, open_checkpoint
from cluster.models.gguf_header import parse_gguf_header
from cluster.models.safetensors_header import LENGTH_BYTES, header_bytes
from coordinator.gguf.architectures import COMPUTED
from coordinator.gguf.layout import lay_out
from coordinator.gguf.source import open_gguf, part_names
from coordinator.hub_download import find_cached, list_files, weights_of
from coordinator.hub_errors import Unreachable, explained
from coordinator.hub_hashes import HubFile
from coordinator.hub_patience import patiently
from coordinator.hub_whole import fetch_whole

_FIRST_BYTES = 256 * 1024
"""Holds the headers of nearly all files, so that one request each is enough."""

_TIMEOUT_S = 30.0
_PARTIAL = 206


def peek(repository: str, revision: str | None) -> Checkpoint:
    """The checkpoint of a model on the hub; its folder holds no weights and is gone already."""
    disable_progress_bars()
    branch = revision or constants.DEFAULT_REVISION
    cached = find_cached(repository, branch)
    if cached is not None:
        return open_checkpoint(cached[0])
    if constants.HF_HUB_OFFLINE:
        raise _offline(repository, branch)
    with tempfile.TemporaryDirectory(prefix="potluck-peek-") as scratch, explained(repository, branch):
        folder = Path(scratch)
        commit, files = patiently(lambda: list_files(repository, branch), repository)
        small = [name for name in (CONFIG_FILE, INDEX_FILE) if name in files]
        for name in small:
            (folder / name).write_bytes(fetch_whole(repository, files[name], commit).read_bytes())
        for name in weights_of(set(files), folder):
            url = hf_hub_url(repository, name, revision=commit)
            patiently(partial(_write_hollow, folder / name, url, _told_bytes(files[name])), name)
        return open_checkpoint(folder)


def peek_gguf(repository: str, revision: str | None, gguf: str) -> Checkpoint:
    """What the GGUF file called `gguf` would become, told from the headers of its model's files."""
    disable_progress_bars()
    branch = revision or constants.DEFAULT_REVISION
    cached = find_cached(repository, branch, gguf)
    if cached is not None:
        return lay_out(open_gguf(cached[0] / gguf)).checkpoint()
    if constants.HF_HUB_OFFLINE:
        raise _offline(repository, branch)
    with tempfile.TemporaryDirectory(prefix="potluck-peek-") as scratch, explained(repository, branch):
        folder = Path(scratch)
        commit, files = patiently(lambda: list_files(repository, branch, gguf), repository)
        for name in part_names(gguf):
            url = hf_hub_url(repository, name, revision=commit)
            size_bytes = _told_bytes(files[name])
            patiently(partial(_write_hollow_gguf, folder / name, url, size_bytes), name)
        return lay_out(open_gguf(folder / gguf)).checkpoint()


def _told_bytes(file: HubFile) -> int:
    """The file's size, which some mirrors do not tell."""
    if file.size_bytes == 0:
        raise Unreachable(f"{constants.ENDPOINT} does not say how long {file.name} is; download the model to find out")
    return file.size_bytes


def _offline(repository: str, branch: str) -> ModelError:
    return ModelError(
        f"{repository} at {branch} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
        "unset it once to download the model"
    )


class _Arriving:
    """The beginning of an answer, read no further than it is needed."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._given = 0
        self.data = bytearray()

    def read(self, size: int, /) -> bytes:
        end = self._given + size
        while len(self.data) < end:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self.data += piece
        found = bytes(self.data[self._given : end])
        self._given += len(found)
        return found


def _write_hollow_gguf(path: Path, url: str, size_bytes: int) -> None:
    """A sparse file of the right length with the header, and the few numbers that say how positions rotate."""
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        arriving = _Arriving(response.iter_bytes())
        header = parse_gguf_header(arriving, size_bytes, path.name)
    path.write_bytes(arriving.data)
    os.truncate(path, size_bytes)
    with path.open("r+b") as file:
        for name in COMPUTED & header.tensors.keys():
            tensor = header.tensors[name]
            file.seek(tensor.begin)
            file.write(_read(url, tensor.begin, min(tensor.end, tensor.begin + _FIRST_BYTES)))


def _write_hollow(path: Path, url: str, size_bytes: int) -> None:
    """A sparse file of the weight file's length that begins with its header."""
    head = _read(url, 0, min(_FIRST_BYTES, size_bytes))
    needed = LENGTH_BYTES + header_bytes(head[:LENGTH_BYTES], size_bytes, path.name)
    if needed > len(head):
        head = _read(url, 0, needed)
    path.write_bytes(head[:needed])
    os.truncate(path, size_bytes)


def _read(url: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end). A server that knows no ranges is read past what comes before, and cut off there."""
    headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={begin}-{end - 1}"}
    data = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        position = begin if response.status_code == _PARTIAL else 0
        for piece in response.iter_bytes():
            data += piece[max(begin - position, 0) :]
            position += len(piece)
            if position >= end:
                break
    if position < end:
        raise ModelError(f"{url} ended at byte {position}; bytes [{begin}, {end}) were asked for. Try again")
    return bytes(data[: end - begin])
