"""Clients that only count what arrives: cheap, so that they do not hold the coordinator up."""

from __future__ import annotations

import json
import selectors
import socket
import time
from types import TracebackType
from typing import Final, Self

_BODY: Final = {"prompt": [20, 21, 22], "max_tokens": 90_000, "ignore_eos": True, "stream": True, "seed": 1}
_READ_BYTES: Final = 1 << 16


class Streams:
    """Streamed completions that go on for longer than anything here lasts."""

    def __init__(self, port: int, count: int) -> None:
        self.events = 0  # that have arrived, one for each token
        self._selector = selectors.DefaultSelector()
        self._connections = [self._open(port) for _ in range(count)]

    def _open(self, port: int) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        body = json.dumps(_BODY).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, connection)
        return connection

    def read_for(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for key, _ in self._selector.select(timeout=0.1):
                data: bytes = key.data.recv(_READ_BYTES)
                assert data, "the coordinator hung up"
                self.events += data.count(b"data: ")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._selector.close()
        for connection in self._connections:
            connection.close()
