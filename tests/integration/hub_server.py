"""A small hub on loopback: as much of the Hugging Face hub's HTTP API as downloading a model takes.

Repositories are folders. Safetensors files are "large": they redirect to a second address, as the hub's do, which
knows ranges. A test can slow it, break it off, or make it refuse, and then read what was asked of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>revision|tree)/(?P<revision>[^/?]+))?")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_PIECE_BYTES = 64 * 1024


@dataclass
class Repository:
    """A folder with one commit. `status` other than 200 is the answer to everything."""

    folder: Path
    commit: str
    status: int = 200
    error_code: str = ""
    revisions: tuple[str, ...] = ("main",)


@dataclass
class Hub:
    """What a test sets and reads. `sent_bytes` counts bodies by file name."""

    url: str
    large_url: str  # another host, as the real hub's is: clients must not send it their token
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # (method, path, first byte asked for)
    sent_bytes: dict[str, int] = field(default_factory=dict)
    stall_after_bytes: int | None = None  # of one large file's answer: then nothing until the client gives up
    cut_after_bytes: int | None = None  # of one large file's answer: then the connection closes, once
    is_plain: bool = False  # tells neither sizes nor hashes of files, as simple mirrors do not
    tells_file_sizes: bool = True  # of large files; some mirrors tell them only beside the hash,
    tells_lfs_sizes: bool = True  # or there neither
    resets: bool = False  # what stalls does not go on but ends with a reset of the connection
    # How many requests of a kind ("api", "small", "large") are answered `busy_status`, to be repeated after a second.
    busy_answers: dict[str, int] = field(default_factory=dict)
    busy_status: int = 429
    refused_at_s: dict[str, float] = field(default_factory=dict)
    impatient: int = 0  # requests that came again sooner
    tokens_seen: set[str] = field(default_factory=set)  # who got one: "api", "small" or, another host, "large"
    damage: dict[str, int] = field(default_factory=dict)  # by file name: so many times it arrives with one other byte


@contextmanager
def hub_server() -> Iterator[Hub]:
    server = _Server(("127.0.0.1", 0), _Handler)
    port = server.server_address[1]
    hub = Hub(f"http://127.0.0.1:{port}", f"http://localhost:{port}")
    server.hub = hub
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients here are killed on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        if "org/" in path:
            self.hub.requests.append((self.command, path, first))
        if match := _API.fullmatch(path):
            if not self._is_busy("api", path):
                self._api(match["repo"], match["verb"], match["revision"] or "main")
        elif match := _RESOLVE.fullmatch(path):
            if _is_large(Path(match["file"])) or not self._is_busy("small", path):
                self._resolve(match["repo"], match["revision"], match["file"])
        elif path.startswith("/large/"):
            if not self._is_busy("large", path):
                repository, _, file = path.removeprefix("/large/").rpartition("/")
                self._send_file(self.hub.repositories[repository].folder / file, first)
        else:
            self._send(404)

    def _is_busy(self, kind: str, path: str) -> bool:
        """Whether the request was refused for now."""
        if "Authorization" in self.headers:
            self.hub.tokens_seen.add(kind)
        now = time.monotonic()
        self.hub.impatient += now - self.hub.refused_at_s.get(path, 0.0) < 0.95
        left = self.hub.busy_answers.get(kind, 0)
        if left > 0:
            self.hub.busy_answers[kind] = left - 1
            self.hub.refused_at_s[path] = now
            self._send(self.hub.busy_status, {"Retry-After": "1"})
        return left > 0

    def _passed(self, path: Path) -> bytes:
        """A file's bytes as they arrive."""
        data = bytearray(path.read_bytes())
        if self.command == "GET" and self.hub.damage.get(path.name, 0) > 0:
            self.hub.damage[path.name] -= 1
            data[-1] ^= 1
        return bytes(data)

    def _repository(self, name: str, revision: str) -> Repository | None:
        """The repository, or None after an error was sent."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(401, {"X-Error-Code": "RepoNotFound"})
        elif repository.status != 200:
            self._send(repository.status, {"X-Error-Code": repository.error_code})
        elif revision not in (*repository.revisions, repository.commit):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None

    def _api(self, name: str, verb: str | None, revision: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        siblings, tree = [], []
        for path in sorted(repository.folder.iterdir()):
            size, blob = path.stat().st_size, git_id(path.read_bytes())
            if self.hub.is_plain:
                siblings.append({"rfilename": path.name})
                continue
            sibling = {"rfilename": path.name, "size": size, "blobId": blob}
            entry = {"type": "file", "path": path.name, "size": size, "oid": blob}
            if _is_large(path):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                sibling["size"] = size if self.hub.tells_file_sizes else None
                lfs_size = size if self.hub.tells_lfs_sizes else None
                sibling["lfs"] = {"sha256": digest, "size": lfs_size, "pointerSize": 134}
                entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
            siblings.append(sibling)
            tree.append(entry)
        info = {"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings, "tags": []}
        info |= {"private": False, "downloads": 0, "likes": 0}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(tree if verb == "tree" else info).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        path = repository.folder / file
        commit = {"X-Repo-Commit": repository.commit}
        if not path.is_file():
            self._send(404, {**commit, "X-Error-Code": "EntryNotFound"})
        elif _is_large(path):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(path.stat().st_size)}
            self._send(302, {**commit, **linked, "Location": f"{self.hub.large_url}/large/{name}/{file}"})
        else:
            data = self._passed(path)
            self.hub.sent_bytes[file] = self.hub.sent_bytes.get(file, 0) + len(data)
            self._send(200, {**commit, "ETag": f'"{git_id(path.read_bytes())}"'}, data)

    def _send_file(self, path: Path, first: int) -> None:
        data = self._passed(path)
        asked = _RANGE.match(self.headers.get("Range", ""))
        if asked and asked[2]:
            data = data[: int(asked[2]) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(data) - first))
        self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        sent = 0
        for begin in range(first, len(data), _PIECE_BYTES):
            if self.hub.stall_after_bytes is not None and sent >= self.hub.stall_after_bytes:
                time.sleep(0.05)
                while self.hub.stall_after_bytes is not None:
                    time.sleep(0.05)
                if self.hub.resets:
                    self._reset()
                    return
            if self.hub.cut_after_bytes is not None and sent >= self.hub.cut_after_bytes:
                self.hub.cut_after_bytes = None
                self.close_connection = True
                return
            piece = data[begin : begin + _PIECE_BYTES]
            try:
                self.wfile.write(piece)
            except ConnectionError:  # the client was killed
                self.close_connection = True
                return
            sent += len(piece)
            self.hub.sent_bytes[path.name] = self.hub.sent_bytes.get(path.name, 0) + len(piece)

    def _reset(self) -> None:
        """End the connection as a machine does that has forgotten it."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def git_id(data: bytes) -> str:
    """What git and the hub call a small file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_large(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin")
