"""How much of its link a source uses, alone and beside others: hardly less than plain sockets get through the same
cables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from node.weights.shelf import Shelf
from tests.integration.netns import Lan, lan, require_lan
from tests.stored_weights import SourceModel

_MBIT_S = {"fast": 150, "slow": 75}
"""Little, so that a busy machine's processor is no part of it."""

_TENSOR_BYTES = 6 * 1024 * 1024
_SHARE_MIN = 0.8
_ATTEMPTS = 3  # what else this machine does only ever makes it slower

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
        seen, began = [], time.monotonic()
        await ensure_slice(request, shelf=Shelf(Path(state)), channel=channel, peers=peers, progress=seen.append)
        took_s = time.monotonic() - began
        print(json.dumps({"took_s": took_s, "received_bytes": seen[-1].received_bytes}))
        await asyncio.gather(channel.close(), *(peer.close() for peer in peers.values()))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def box() -> Iterator[Lan]:
    require_lan()
    with lan("here", *_MBIT_S) as made:
        for name, mbit_s in _MBIT_S.items():
            made.set_rate(name, mbit_s)
        yield made


@dataclass(frozen=True, slots=True)
class _Site:
    """Machines, and a model in memory: a busy disk would be the slowest part."""

    box: Lan
    folder: Path
    source: SourceModel

    @property
    def total_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.source.manifest.tensors)

    def plain_bytes_s(self, names: Sequence[str]) -> float:
        """What plain sockets get from these machines at once, each sending as much as its link lets it."""
        addresses = []
        for name in names:
            share = self.total_bytes * _MBIT_S[name] // sum(_MBIT_S[other] for other in names)
            command = [sys.executable, "-c", _SEND, self.box.address(name), str(share)]
            port = int(_first_line(self.box.popen(name, command, stdout=subprocess.PIPE, text=True)))
            addresses.append(f"{self.box.address(name)}:{port}")
        return self.total_bytes / float(self._output([sys.executable, "-c", _RECEIVE, *addresses]))

    def fetched_bytes_s(self, coordinator: str, peers: Sequence[str]) -> float:
        """The rate at which a node without anything gets the model; an empty `coordinator` stands for one that sends no
        tensor."""
        state = self.folder / "state"
        arguments = [str(self.source.folder), self.source.manifest.id, str(state), coordinator, *peers]
        said = json.loads(self._output([sys.executable, "-c", _FETCH, *arguments]))
        shutil.rmtree(state)
        assert self.total_bytes <= said["received_bytes"] <= self.total_bytes * 1.05
        return float(self.total_bytes / said["took_s"])

    def _output(self, command: Sequence[str]) -> str:
        process = self.box.popen("here", command, stdout=subprocess.PIPE, text=True)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        return str(output)


@pytest.fixture
def site(box: Lan) -> Iterator[_Site]:
    folder = Path("/dev/shm") / box.name
    try:
        yield _Site(box, folder, SourceModel(folder / "model", 0, _TENSOR_BYTES))
    finally:
        shutil.rmtree(folder)


def _first_line(process: subprocess.Popen[Any]) -> str:
    assert process.stdout is not None
    return str(process.stdout.readline())


def _assert_nearly_as_fast(site: _Site, names: Sequence[str], coordinator: str, peers: Sequence[str]) -> None:
    """Each attempt is compared with what plain sockets got just before it."""
    shares = []
    for _ in range(_ATTEMPTS):
        plain_bytes_s = site.plain_bytes_s(names)
        shares.append(site.fetched_bytes_s(coordinator, peers) / plain_bytes_s)
        if shares[-1] >= _SHARE_MIN:
            break
    assert max(shares) >= _SHARE_MIN, shares


@pytest.mark.root
def test_the_coordinator_alone_uses_its_link(site: _Site) -> None:
    """The usual first load: nobody else has anything yet."""
    command = [sys.executable, "-m", "tests.integration.coordinator_role", str(site.source.folder)]
    role = site.box.popen(
        "fast", [*command, site.box.address("fast")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    _assert_nearly_as_fast(site, ["fast"], _first_line(role).strip(), [])


@pytest.mark.root
def test_unequal_sources_together_use_their_links(site: _Site) -> None:
    addresses = []
    for name in _MBIT_S:
        store = site.source.put(Shelf(site.folder / name))
        for entry in site.source.manifest.files:
            if not entry.header_bytes and entry.name != "tokenizer.json":
                store.put_whole(entry, (site.source.folder / entry.name).read_bytes())
        store.close()
        state, host = str(site.folder / name), site.box.address(name)
        command = [sys.executable, "-m", "tests.integration.peer_role", state, "0", host]
        role = site.box.popen(name, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        addresses.append(json.loads(_first_line(role))["address"])
    _assert_nearly_as_fast(site, list(_MBIT_S), "", addresses)
