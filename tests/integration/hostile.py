"""What hostile peers need to know of a cluster that serves, and what must become of those whom they cannot harm."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
import psutil

from cluster.errors import PotluckError
from cluster.frames import Hello, StreamRole
from cluster.handshake import greet
from cluster.plan import Fence
from cluster.quantities import MIB
from cluster.transport import Credentials, open_stream
from cluster.types import DeploymentId, Epoch
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc
from tests.integration.answers import Served
from tests.integration.live import Bystander, Coordinator, Pool, happenings

WAIT_S = 30.0

_MEMORY_MAX_BYTES = 64 * MIB
"""What a node's peak may grow by while it refuses things. The smallest lie below announces 512 GiB."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage that serves: where it listens, and what only its coordinator should know."""

    index: int
    address: str
    pid: int
    fence: Fence

    def hello(self) -> Hello:
        return Hello(self.fence, self.index, StreamRole.UPSTREAM)


def stages_of(coordinator: Coordinator, pool: Pool) -> list[Stage]:
    names = [stage["node"] for stage in coordinator.status()["plan"]["stages"]]
    holder = happenings(coordinator.process, "listening")[0]["coordinator"]
    fences = [asyncio.run(_spy(pool.addresses[name], holder)) for name in names]
    return [
        Stage(index, pool.addresses[name], pool.processes[name].pid, fence)
        for index, (name, fence) in enumerate(zip(names, fences, strict=True))
    ]


@contextlib.contextmanager
def unharmed_by(coordinator: Coordinator, served: Served, stages: Sequence[Stage]) -> Iterator[None]:
    """Somebody else's answers stay right all the while, and no node takes memory for what it refuses."""
    before = [_peak_bytes(stage.pid) for stage in stages]
    with Bystander(coordinator, served.asked.prompt, served.asked.ids):
        yield
    grown = [_peak_bytes(stage.pid) - peak for stage, peak in zip(stages, before, strict=True)]
    assert max(grown) < _MEMORY_MAX_BYTES


async def closes(stage: Stage, messages: Sequence[bytes], *, greeting: Hello | None) -> bool:
    """Whether the node ends the stream after these messages."""
    stream = open_stream(Credentials(), stage.address)
    try:
        async with asyncio.timeout(WAIT_S):
            if greeting is not None:
                await greet(stream, greeting)
            for message in messages:
                await stream.write(message)
            return await stream.read() is None
    except PotluckError:
        return True  # gRPC itself refused, or the node hung up while we were writing
    finally:
        await stream.close()


def message(header: object, payload: bytes = b"") -> bytes:
    packed = msgpack.packb(header)
    return struct.pack("<I", len(packed)) + packed + payload


async def _spy(address: str, holder: str) -> Fence:
    """The epoch that a node is in, as its coordinator sees it."""
    async with Credentials().channel(address) as channel:
        stub: rpc.NodeAsyncStub = rpc.NodeStub(channel)
        async for beat in stub.Watch(pb.WatchRequest(coordinator_id=holder), timeout=WAIT_S):
            return Fence(DeploymentId(beat.fence.deployment), Epoch(beat.fence.epoch))
    raise AssertionError("no heartbeat")


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status")
    if not status.exists():  # not Linux: what it takes now will have to do
        return int(psutil.Process(pid).memory_info().rss)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
