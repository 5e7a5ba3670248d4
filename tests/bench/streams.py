"""Clients that only count what arrives: cheap, so that they do not hold the coordinator up."""

from __future__ import annotations

import json
import selectors
import socket
import time
from types import TracebackType
from typing import Final, Self

MAX_TOKENS: Final = 90_000
_BODY: Final = {"prompt": [20, 21, 22], "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": True, "seed": 1}
_READ_BYTES: Final = 1 << 16


def ask(port: int, *, receive_buffer_bytes: int | None = None) -> socket.socket:
    """A connection on which an answer has been asked for that goes on for longer than anything here lasts."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if receive_buffer_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    body = json.dumps(_BODY).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


class Streams:
    """Streamed completions that are read as fast as they come."""

    def __init__(self, port: int, count: int) -> None:
        self.events = 0  # that have arrived, one for each token
        self._selector = selectors.DefaultSelector()
        self._connections = [ask(port) for _ in range(count)]
        for connection in self._connections:
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, connection)

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
