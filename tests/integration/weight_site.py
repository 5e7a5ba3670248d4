"""Machines with links of known rates and a model in memory: how fast weights come over them, beside plain sockets.

A busy disk would be the slowest part, so everything lies in memory. Used by tests, and by the benchmark's row.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.weights.shelf import Shelf
from tests.integration.netns import Lan, lan
from tests.stored_weights import SourceModel

_TIMEOUT_S = 120.0

_SEND = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    peer, _ = server.accept()
    left, piece = int(sys.argv[2]), bytes(1 << 16)
    while left > 0:
        left -= peer.send(piece[:left])
    peer.close()
"""

_RECEIVE = """
import socket, sys, threading, time
def read(host, port):
    with socket.create_connection((host, int(port))) as peer:
        while peer.recv(1 << 20):
            pass
threads = [threading.Thread(target=read, args=address.split(":")) for address in sys.argv[1:]]
began = time.monotonic()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(time.monotonic() - began)
"""

_FETCH = """
import asyncio, contextlib, json, sys, time
from pathlib import Path
import grpc
from cluster.transport import Credentials
from cluster.types import LayerRange
from node.weights.fetch import SliceRequest, ensure_slice
from node.weights.shelf import Shelf
from tests.integration.weight_roles import LAYERS, serving

async def refuse(request, context, pieces):
    await context.abort(grpc.StatusCode.DATA_LOSS, "only the others send")
    yield

async def main(folder, model, state, address, *addresses):
    async with contextlib.AsyncExitStack() as stack:
        if not address:
            address = (await stack.enter_async_context(serving(Path(folder), twist=refuse))).address
        peers = {address: Credentials().channel(address) for address in addresses}
        request = SliceRequest(model, LayerRange(0, LAYERS), LAYERS, None)
        channel = Credentials().channel(address)
        seen, began, busy = [], time.monotonic(), time.process_time()
        await ensure_slice(request, shelf=Shelf(Path(state)), channel=channel, peers=peers, progress=seen.append)
        took_s = time.monotonic() - began
        said = {"took_s": took_s, "received_bytes": seen[-1].received_bytes, "busy_s": time.process_time() - busy}
        print(json.dumps(said))
        await asyncio.gather(channel.close(), *(peer.close() for peer in peers.values()))

asyncio.run(main(*sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True)
class Sources:
    """Machines that send at once. An empty `coordinator` stands for one that sends no tensor."""

    machines: tuple[str, ...]
    coordinator: str
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model that has come."""

    bytes_s: float
    busy_s: float  # the receiver's processor time


@dataclass(frozen=True, slots=True)
class Site:
    """Machines that hold a model, by name with the rates of their links, and one that has nothing."""

    box: Lan
    mbit_s: Mapping[str, int]
    folder: Path
    source: SourceModel

    @property
    def total_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.source.manifest.tensors)

    def coordinator_alone(self, name: str) -> Sources:
        """The usual first load: nobody else has anything yet."""
        command = [sys.executable, "-m", "tests.integration.coordinator_role", str(self.source.folder)]
        role = self._start(name, [*command, self.box.address(name)])
        return Sources((name,), _first_line(role).strip(), ())

    def nodes_alone(self) -> Sources:
        """A node on every machine, each with all of the model in its store."""
        addresses = []
        for name in self.mbit_s:
            store = self.source.put(Shelf(self.folder / name))
            for entry in self.source.manifest.files:
                if not entry.header_bytes and entry.name != "tokenizer.json":
                    store.put_whole(entry, (self.source.folder / entry.name).read_bytes())
            store.close()
            command = [sys.executable, "-m", "tests.integration.peer_role", str(self.folder / name), "0"]
            addresses.append(json.loads(_first_line(self._start(name, [*command, self.box.address(name)])))["address"])
        return Sources(tuple(self.mbit_s), "", tuple(addresses))

    def plain_bytes_s(self, sources: Sources) -> float:
        """What plain sockets get from these machines at once, each sending as much as its link lets it."""
        addresses = []
        for name in sources.machines:
            share = self.total_bytes * self.mbit_s[name] // sum(self.mbit_s[other] for other in sources.machines)
            port = int(
                _first_line(self._start(name, [sys.executable, "-c", _SEND, self.box.address(name), str(share)]))
            )
            addresses.append(f"{self.box.address(name)}:{port}")
        return self.total_bytes / float(self._output([sys.executable, "-c", _RECEIVE, *addresses]))

    def fetch(self, sources: Sources) -> Fetched:
        """A node without anything gets the model."""
        state = self.folder / "state"
        arguments = [str(self.source.folder), self.source.manifest.id, str(state), sources.coordinator, *sources.peers]
        said = json.loads(self._output([sys.executable, "-c", _FETCH, *arguments]))
        shutil.rmtree(state)
        assert self.total_bytes <= said["received_bytes"] <= self.total_bytes * 1.05
        return Fetched(self.total_bytes / said["took_s"], said["busy_s"])

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[Any]:
        return self.box.popen(name, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _output(self, command: Sequence[str]) -> str:
        process = self.box.popen("here", command, stdout=subprocess.PIPE, text=True)
        output, _ = process.communicate(timeout=_TIMEOUT_S)
        assert process.returncode == 0
        return str(output)


@contextlib.contextmanager
def weight_site(mbit_s: Mapping[str, int], tensor_bytes: int) -> Iterator[Site]:
    """Needs what `tests.integration.netns` needs."""
    with lan("here", *mbit_s) as box:
        for name, rate in mbit_s.items():
            box.set_rate(name, rate)
        folder = Path("/dev/shm") / box.name
        try:
            yield Site(box, mbit_s, folder, SourceModel(folder / "model", 0, tensor_bytes))
        finally:
            shutil.rmtree(folder)


def _first_line(process: subprocess.Popen[Any]) -> str:
    assert process.stdout is not None
    return str(process.stdout.readline())
