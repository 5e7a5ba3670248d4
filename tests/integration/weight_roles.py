"""A coordinator that serves weights on loopback, and that a test can make slow, broken or dishonest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.models.checkpoint import open_checkpoint
from cluster.models.manifest import Manifest, build_manifest
from cluster.transport import Credentials, create_server
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc
from coordinator.weights import WeightServer

LAYERS = 6

Twist = Callable[[pb.ReadFileRequest, Any, AsyncIterator[pb.Bytes]], AsyncIterator[pb.Bytes]]
"""Stands between the honest answer to ReadFile and the wire."""


@dataclass
class Coordinator:
    """What runs, and what it has sent."""

    address: str
    manifest: Manifest
    weights: WeightServer
    sent_bytes: int = 0
    reads: list[tuple[str, int, int]] = field(default_factory=list)  # (file, offset, length)
    tensors_asked_for: asyncio.Event = field(default_factory=asyncio.Event)


class _Server(WeightServer):
    def __init__(self, streams_max: int, twist: Twist | None) -> None:
        super().__init__(streams_max)
        self._twist = twist
        self.coordinator: Coordinator

    async def ReadFile(self, request: pb.ReadFileRequest, context: Any) -> AsyncIterator[pb.Bytes]:
        self.coordinator.reads.append((request.file, request.offset, request.length))
        if request.offset > 0:
            self.coordinator.tensors_asked_for.set()
        pieces = super().ReadFile(request, context)
        async for piece in pieces if self._twist is None else self._twist(request, context, pieces):
            self.coordinator.sent_bytes += len(piece.data)
            yield piece

    async def GetManifest(self, request: pb.GetManifestRequest, context: Any) -> AsyncIterator[pb.Bytes]:
        async for piece in super().GetManifest(request, context):
            self.coordinator.sent_bytes += len(piece.data)
            yield piece


@asynccontextmanager
async def serving(
    folder: Path, *, twist: Twist | None = None, streams_max: int = 64, manifest: Manifest | None = None
) -> AsyncIterator[Coordinator]:
    manifest = manifest or build_manifest(open_checkpoint(folder), name="tiny", revision="local")
    weights = _Server(streams_max, twist)
    weights.add(manifest, folder)
    server = create_server()
    rpc.add_WeightsServicer_to_server(weights, server)
    port = Credentials().bind(server, "127.0.0.1:0")
    weights.coordinator = Coordinator(f"127.0.0.1:{port}", manifest, weights)
    await server.start()
    try:
        yield weights.coordinator
    finally:
        await server.stop(0)
        weights.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run an async test to its end, with a bound."""

    async def bounded() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(bounded())
