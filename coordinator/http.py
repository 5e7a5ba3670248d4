"""Runs the HTTP API under uvicorn inside our event loop, and stops it when we say so."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from cluster.errors import UsageError

_GRACE_S = 2
"""Answers under way get this long after a stop signal; whoever pressed Ctrl-C is waiting."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: this process has more to stop than HTTP."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """Bind at once, so that a taken port is found before anything long begins."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot serve HTTP on {host}:{port}: {error.strerror}; choose another port with --port"
        ) from error
    return listener


async def serve_http(app: Starlette, listener: socket.socket, stop: asyncio.Event) -> None:
    """Serve `app` until `stop` is set."""
    config = uvicorn.Config(
        app,
        log_config=None,  # requests are not logged: prompts must never reach a log
        access_log=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    finally:
        stopping.cancel()
