"""A coordinator's weights as a process of its own: `python -m tests.integration.coordinator_role FOLDER HOST`.

Its first line is its address; it serves until standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from cluster.models.checkpoint import open_checkpoint
from cluster.models.manifest import build_manifest
from cluster.transport import Credentials, create_server
from cluster.wire import node_pb2_grpc as rpc
from coordinator.weights import WeightServer


async def _main(folder: str, host: str) -> None:
    weights = WeightServer()
    weights.add(build_manifest(open_checkpoint(Path(folder)), name="tiny", revision="local"), Path(folder))
    server = create_server()
    rpc.add_WeightsServicer_to_server(weights, server)
    port = Credentials().bind(server, f"{host}:0")
    await server.start()
    sys.stdout.write(f"{host}:{port}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)
    weights.close()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
