"""A node's disk as a process of its own: `python -m tests.integration.peer_role STATE [PAUSE_S [HOST]]`.

Serves what its store holds, tensors slowly, with PAUSE_S between pieces; its first line is its address. Then every line
on standard input is a fetch, answered by lines of progress and one with the outcome.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from cluster.errors import PotluckError
from cluster.transport import Credentials, create_server
from cluster.types import LayerRange, ModelId
from cluster.weight_service import WeightService
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc
from node.weights.fetch import SliceRequest, ensure_slice
from node.weights.meter import FetchProgress
from node.weights.sharing import share
from node.weights.shelf import Shelf
from tests.integration.weight_roles import LAYERS


class _Paced(WeightService):
    def __init__(self, shelf: Shelf, pause_s: float) -> None:
        super().__init__(share(shelf)._find, 16)
        self._pause_s = pause_s

    async def ReadFile(self, request: pb.ReadFileRequest, context: Any) -> AsyncIterator[pb.Bytes]:
        async for piece in super().ReadFile(request, context):
            for begin in range(0, len(piece.data), 128 * 1024):
                yield pb.Bytes(data=piece.data[begin : begin + 128 * 1024])
                await asyncio.sleep(self._pause_s if request.offset else 0)


def _say(document: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


async def _fetch(shelf: Shelf, order: dict[str, Any]) -> None:
    last: list[FetchProgress] = []

    def progress(now: FetchProgress) -> None:
        last[:] = [now]
        _say({"received_bytes": now.received_bytes})

    channel = Credentials().channel(order["coordinator"])
    peers = {address: Credentials().channel(address) for address in order["peers"]}
    request = SliceRequest(ModelId(order["model"]), LayerRange(*order["layers"]), LAYERS, None)
    try:
        folder = await ensure_slice(request, shelf=shelf, channel=channel, peers=peers, progress=progress)
        _say({"folder": str(folder), "received_bytes": last[0].received_bytes, "total_bytes": last[0].total_bytes})
    except PotluckError as error:
        _say({"error": str(error), "kind": type(error).__name__})
    finally:
        await asyncio.gather(channel.close(), *(peer.close() for peer in peers.values()))


async def _main(state: str, pause_s: str = "0", host: str = "127.0.0.1") -> None:
    shelf = Shelf(Path(state))
    service = _Paced(shelf, float(pause_s)) if float(pause_s) else share(shelf)
    server = create_server()
    rpc.add_WeightsServicer_to_server(service, server)
    port = Credentials().bind(server, f"{host}:0")
    await server.start()
    _say({"address": f"{host}:{port}"})
    while line := await asyncio.to_thread(sys.stdin.readline):
        await _fetch(shelf, json.loads(line))
    await server.stop(0)
    service.close()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
