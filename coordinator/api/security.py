"""Refuses requests that a web page made: wrong Host (DNS rebinding) or foreign Origin.

A browser lets any page send requests to addresses on this machine and network. A page cannot choose the Host header:
after rebinding its own domain to our address it still sends that domain. So a Host must be one that no outsider can
own. There are no CORS headers: other origins may not read answers.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.api.errors import Problem
from coordinator.lanes import ADDRESS_END

_PRIVATE_SUFFIXES: Final = (".local", ".lan", ".internal", ".home.arpa", ".localhost")
"""Names under these never come from the public DNS (mDNS, RFC 6762; home.arpa, RFC 8375; internal, ICANN)."""


class HostCheck:
    """ASGI middleware. `bound_host` is the address that the server listens on; `allowed_hosts` are names to accept
    besides, such as a reverse proxy's."""

    def __init__(self, app: ASGIApp, bound_host: str, allowed_hosts: Collection[str] = ()) -> None:
        self._app = app
        self._loopback = _is_loopback(bound_host)
        self._allowed = {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._problem(Headers(scope=scope))
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, headers: Headers) -> Problem | None:
        host = headers.get("host", "").lower()
        if not self._accepts(hostname(host)):
            message = f"the Host header {host[:80]!a} does not name this server; use localhost or its address"
            return Problem(403, "invalid_request_error", message, None, "host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host:
            message = f"requests from pages of {origin[:80]!a} are not allowed"
            return Problem(403, "invalid_request_error", message, None, "origin_not_allowed")
        return None

    def _accepts(self, name: str) -> bool:
        if name in self._allowed or _is_loopback(name):
            return True
        if self._loopback or not name:
            return False
        # Reachable from the network: addresses, names without a dot and private names cannot be an outsider's.
        return _is_address(name) or "." not in name or name.endswith(_PRIVATE_SUFFIXES)


def client_of(request: Request) -> str:
    """Who takes turns with whom: an address, and the key that it sent. Keys are not checked here, and many programs
    send the same made-up one, so a key alone would make one client of many machines."""
    address, key = request.client.host if request.client else "", key_of(request)
    return f"{address}{ADDRESS_END}{key}" if key else address


def key_of(request: Request) -> str:
    """What stands for the key that a client sent; empty where it sent none."""
    key = request.headers.get("authorization", "")
    return hashlib.sha256(key.encode()).hexdigest()[:16] if key else ""


def hostname(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
