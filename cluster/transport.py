"""gRPC as this project uses it: servers, channels, and the data plane's raw byte streams.

Owns every gRPC option in one place. Every channel and every server comes from a Credentials value, so that
encrypting the cluster later changes this file alone. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio

from cluster.errors import ClusterError
from cluster.limits import GRPC_MESSAGE_BYTES_MAX, KEEPALIVE_TIME_S, KEEPALIVE_TIMEOUT_S
from cluster.status import rpc_errors

_DATA_SERVICE = "cluster.wire.Data"
_DATA_METHOD = "Open"

_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", GRPC_MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", GRPC_MESSAGE_BYTES_MAX),
    # Keepalive alone needs a minute to notice a frozen peer on an idle stream; with the ping timeout, seconds.
    ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A server that does not allow our pings would close the connection for "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
]

_CHANNEL_OPTIONS = [
    *_OPTIONS,
    # A machine that comes back is dialled again within a second, not after gRPC's default two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Machines on a LAN are reached directly, whatever http_proxy says.
    ("grpc.enable_http_proxy", 0),
    # Two channels to the same address must not share one connection: a stuck link is closed alone.
    ("grpc.use_local_subchannel_pool", 1),
]

_SERVER_OPTIONS = [
    *_OPTIONS,
    # A second server on the same port is an error to report, not half of the traffic.
    ("grpc.so_reuseport", 0),
]


@dataclass(frozen=True, slots=True)
class Credentials:
    """How links are protected. Only plain text exists today; DESIGN asks for mutual TLS behind this type."""

    def channel(self, address: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)

    def bind(self, server: grpc.aio.Server, address: str) -> int:
        """Listen on `address`; returns the port, which gRPC chose when the address ends in `:0`."""
        try:
            port = server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ClusterError(f"cannot listen on {address}: the address is not this machine's, or the port is taken")
        return port


class ByteStream(Protocol):
    """One end of a bidirectional stream of wire messages."""

    async def read(self) -> bytes | None:
        """The next message, or None when the other side has closed."""
        ...

    async def write(self, message: bytes) -> None: ...


DataHandler = Callable[[ByteStream], Awaitable[None]]


class _ServerStream:
    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._context = context

    async def read(self) -> bytes | None:
        message = await self._context.read()
        return message if isinstance(message, bytes) else None

    async def write(self, message: bytes) -> None:
        await self._context.write(message)


class ClientStream:
    """The dialling end of a data stream."""

    def __init__(self, channel: grpc.aio.Channel, address: str) -> None:
        self._channel = channel
        self._who = f"the stream to {address}"
        method = f"/{_DATA_SERVICE}/{_DATA_METHOD}"
        # No serialisers: grpc.aio passes bytes through untouched.
        self._call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(method)()

    async def read(self) -> bytes | None:
        with rpc_errors(self._who):
            message = await self._call.read()
        return message if isinstance(message, bytes) else None

    async def write(self, message: bytes) -> None:
        with rpc_errors(self._who):
            await self._call.write(message)

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


def open_stream(credentials: Credentials, address: str) -> ClientStream:
    """Dial `address`. Returns at once; the first read or write finds out whether anyone is there."""
    return ClientStream(credentials.channel(address), address)


def data_service(handler: DataHandler) -> grpc.GenericRpcHandler:
    """The data plane's service: `handler(stream)` is awaited for every stream that a peer opens."""

    async def serve(request_iterator: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        del request_iterator  # the reader-writer API of the context is used instead
        await handler(_ServerStream(context))

    return grpc.method_handlers_generic_handler(
        _DATA_SERVICE,
        {_DATA_METHOD: grpc.stream_stream_rpc_method_handler(serve)},
    )


def create_server() -> grpc.aio.Server:
    return grpc.aio.server(options=_SERVER_OPTIONS)
