"""A holder of weights as a source of bytes: a manifest, what it holds, and ranges of files.

Owns deadlines and repetition. The coordinator is worth waiting for, since without it there is no load anyway; a
node that fails is left out, and its work goes to another source. Knows nothing of disks or what the bytes mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable

import grpc
import grpc.aio

from cluster.errors import ClusterError, ModelError, NodeLost, PotluckError, WireError
from cluster.limits import MANIFEST_BYTES_MAX
from cluster.quantities import format_bytes
from cluster.types import ModelId
from cluster.wire import node_pb2_grpc as rpc
from cluster.wire.node_pb2 import Bytes, GetHoldingsRequest, GetManifestRequest, ReadFileRequest

_RETRY_DELAY_S = 0.25
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""The link broke, or the coordinator is busy with other nodes: both pass."""

_PEER_STALL_TIMEOUT_S = 5.0
"""Another source has the same bytes, so a node that is silent for so long is not waited for."""

_HOLDINGS_TIMEOUT_S = 2.0
"""The load waits for this answer; a node that is slower than this would be a slow source too."""


class SourceFailed(Exception):
    """This source cannot deliver; another one may. `error` is what to say when none can."""

    def __init__(self, error: PotluckError) -> None:
        super().__init__(str(error))
        self.error = error


class Source:
    """Reads one model from one holder. `received_bytes` counts everything that came over the network."""

    def __init__(
        self, channel: grpc.aio.Channel, model: ModelId, stall_timeout_s: float, peer_name: str | None = None
    ) -> None:
        self._stub: rpc.WeightsAsyncStub = rpc.WeightsStub(channel)
        self._model = model
        self.is_coordinator = peer_name is None
        self.name = peer_name or "the coordinator"
        self._stall_timeout_s = stall_timeout_s if peer_name is None else min(stall_timeout_s, _PEER_STALL_TIMEOUT_S)
        self.received_bytes = 0

    async def holdings(self) -> bytes:
        """Which tensors it has; nothing when it does not answer in time."""
        try:
            request = GetHoldingsRequest(model_id=self._model)
            return (await self._stub.GetHoldings(request, timeout=_HOLDINGS_TIMEOUT_S)).tensors
        except grpc.aio.AioRpcError:
            return b""  # it has nothing of this model, or it is gone: both mean that it is no source

    async def manifest(self) -> bytes:
        """The manifest's bytes, unchecked but for their number."""
        started = asyncio.get_running_loop().time()
        while True:
            data = bytearray()
            call = self._stub.GetManifest(GetManifestRequest(model_id=self._model))
            try:
                while piece := await self._next_piece(call.read()):
                    data += piece
                    if len(data) > MANIFEST_BYTES_MAX:
                        raise SourceFailed(WireError(f"the manifest is longer than {format_bytes(MANIFEST_BYTES_MAX)}"))
                return bytes(data)
            except grpc.aio.AioRpcError as error:
                await self._before_retry(error, started, "the manifest")
            finally:
                call.cancel()

    async def read(self, file: str, begin: int, end: int) -> AsyncGenerator[bytes, None]:
        """Bytes [begin, end) of `file` in pieces, exactly that many or SourceFailed."""
        clock = asyncio.get_running_loop().time
        position, moved = begin, clock()
        while position < end:
            request = ReadFileRequest(model_id=self._model, file=file, offset=position, length=end - position)
            call = self._stub.ReadFile(request)
            try:
                while piece := await self._next_piece(call.read()):
                    position, moved = position + len(piece), clock()
                    if position > end:
                        raise self._broken(f"sent more of {file} than bytes [{begin}, {end})")
                    yield piece
                if position < end:
                    raise self._broken(f"ended {file} at byte {position}; expected bytes [{begin}, {end})")
            except grpc.aio.AioRpcError as error:
                await self._before_retry(error, moved, file)
            finally:
                call.cancel()

    async def _next_piece(self, read: Awaitable[object]) -> bytes | None:
        """What the next message carries, or None at the end of the stream."""
        try:
            message = await asyncio.wait_for(read, self._stall_timeout_s)
        except TimeoutError:
            raise SourceFailed(
                NodeLost(
                    f"no weights came from {self.name} for {self._stall_timeout_s:.0f} s; "
                    "check its disk and the network between the two machines"
                )
            ) from None
        if not isinstance(message, Bytes):
            return None
        if not message.data:
            raise self._broken("sent an empty piece")  # an endless stream of them would never stall
        self.received_bytes += len(message.data)
        return message.data

    async def _before_retry(self, error: grpc.aio.AioRpcError, moved: float, what: str) -> None:
        """Wait a moment, or raise what the error means when waiting will not help."""
        detail = error.details() or error.code().name
        if error.code() in _AGAIN:
            if self.is_coordinator and asyncio.get_running_loop().time() - moved < self._stall_timeout_s:
                await asyncio.sleep(_RETRY_DELAY_S)
                return
            tried = f" for {self._stall_timeout_s:.0f} s" if self.is_coordinator else ""
            raise SourceFailed(NodeLost(f"cannot fetch {what} from {self.name}{tried}: {detail}"))
        if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS):
            raise SourceFailed(ModelError(f"{self.name} cannot deliver {what}: {detail}"))
        raise SourceFailed(ClusterError(f"fetching {what} from {self.name} failed: {detail} ({error.code().name})"))

    def _broken(self, how: str) -> SourceFailed:
        return SourceFailed(WireError(f"{self.name} {how}"))
