"""One large file of the hub as a finished blob: streamed, continued after a kill, checked by SHA-256.

Knows HTTP ranges and the part on disk. Which files and why is `coordinator.hub_download`'s matter.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError

# Neither module declares what it re-exports; TransportError is httpx's or httpx2's, whichever the library uses.
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from cluster.errors import ModelError
from cluster.models.hashing import Advance, remember
from cluster.models.passing import PassingHashes
from cluster.quantities import MIB
from coordinator.hub_hashes import HubFile
from coordinator.hub_patience import asked_delay_s, is_transient, pause_s

if TYPE_CHECKING:
    from hashlib import _Hash

_CHUNK_BYTES = 1 * MIB
_FRUITLESS_TRIES_MAX = 5
_LOCK_INTERVAL_S = 0.5


class BlobStream:
    """Fetches `file` from `url` into `blobs`, where a finished file is called by its hash."""

    def __init__(
        self,
        url: str,
        file: HubFile,
        blobs: Path,
        advance: Advance,
        cancelled: threading.Event,
        hashes: Path | None = None,
    ) -> None:
        """`hashes` is where to remember the hashes of the file's tensors, which are known when it is here."""
        self._url = url
        self._file = file
        self._blob = blobs / file.sha256
        self._part = part_path(blobs, file)
        self._advance = advance
        self._cancelled = cancelled
        self._hashes = hashes
        self._hash: _Hash
        self._parts: PassingHashes
        self._position = 0

    def fetch(self) -> None:
        self._part.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: whatever was received is in the file when this process is killed.
        with self._part.open("a+b", buffering=0) as part:
            self._lock(part)
            if self._blob.exists():  # another process finished it while this one waited
                self._part.unlink(missing_ok=True)
                self._advance(self._file.size_bytes)
                return
            for _ in range(2):  # a part from an earlier time may be damaged; a second, whole download is not
                self._read_back(part)
                self._stream(part)
                if self._hash.hexdigest() == self._file.sha256:
                    os.fsync(part.fileno())
                    self._part.replace(self._blob)
                    self._remember()
                    return
                self._restart(part)
        raise ModelError(
            f"{self._file.name} arrived twice with another SHA-256 than the hub announced; try again later, "
            "or check whether a proxy changes downloads"
        )

    def _lock(self, part: BinaryIO) -> None:
        while True:
            try:
                fcntl.flock(part.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._wait(_LOCK_INTERVAL_S)

    def _read_back(self, part: BinaryIO) -> None:
        """Hash what an earlier download left."""
        self._begin()
        if os.fstat(part.fileno()).st_size > self._file.size_bytes:
            part.truncate(0)
        part.seek(0)
        while data := part.read(_CHUNK_BYTES):
            self._take(data)
            self._check_cancelled()

    def _stream(self, part: BinaryIO) -> None:
        fruitless = 0
        while self._position < self._file.size_bytes:
            before, delay_s = self._position, 0.0
            try:
                self._stream_once(part)
                trouble = "it ended early"
            except HfHubHTTPError as error:
                if not is_transient(error):
                    raise
                trouble = f"HTTP status {error.response.status_code}"
                delay_s = asked_delay_s(error.response.headers)
            except TransportError as error:
                trouble = str(error) or type(error).__name__
            if self._position < self._file.size_bytes:
                fruitless = 0 if self._position > before else fruitless + 1
                if fruitless > _FRUITLESS_TRIES_MAX:
                    raise ModelError(
                        f"downloading {self._file.name} failed {fruitless} times: {trouble}. What arrived is kept: "
                        "check the network and start again"
                    )
                self._wait(pause_s(fruitless, delay_s))

    def _stream_once(self, part: BinaryIO) -> None:
        headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={self._position}-"}
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", self._url, headers=headers, timeout=timeout_s) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and self._position > 0:
                self._restart(part)  # this server knows no ranges
            for data in response.iter_bytes():  # as it arrives: with a size, a broken connection loses a part
                self._check_cancelled()
                if self._position + len(data) > self._file.size_bytes:
                    raise ModelError(f"{self._file.name} is longer than the {self._file.size_bytes} bytes announced")
                part.write(data)
                self._take(data)

    def _take(self, data: bytes) -> None:
        self._hash.update(data)
        self._parts.feed(data)
        self._position += len(data)
        self._advance(len(data))

    def _restart(self, part: BinaryIO) -> None:
        part.truncate(0)
        self._advance(-self._position)
        self._begin()

    def _begin(self) -> None:
        self._hash, self._position = hashlib.sha256(), 0
        self._parts = PassingHashes(self._file.name, self._file.size_bytes)

    def _remember(self) -> None:
        if self._hashes is not None:
            whole = {(0, self._file.size_bytes): self._file.sha256}
            remember(self._blob, whole | self._parts.digests(), self._hashes)

    def _wait(self, seconds: float) -> None:
        self._cancelled.wait(seconds)
        self._check_cancelled()

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise ModelError(f"the download of {self._file.name} was broken off; it goes on there the next time")


def part_path(blobs: Path, file: HubFile) -> Path:
    """Where what has arrived of a file is kept."""
    return blobs / f"{file.sha256}.potluck.incomplete"
