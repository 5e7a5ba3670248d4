"""How much of their links several sources use: never much less than plain sockets get through the same cables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
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
import asyncio, json, sys, time
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

async def main(folder, state, *addresses):
    async with serving(Path(folder), twist=refuse) as coordinator:
        peers = {address: Credentials().channel(address) for address in addresses}
        request = SliceRequest(coordinator.manifest.id, LayerRange(0, LAYERS), LAYERS, None)
        channel = Credentials().channel(coordinator.address)
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


def _first_line(process: subprocess.Popen[Any]) -> str:
    assert process.stdout is not None
    return str(process.stdout.readline())


def _plain_bytes_s(box: Lan, total_bytes: int) -> float:
    """What plain sockets get from all machines at once, each sending as much as its link lets it."""
    addresses = []
    for name, mbit_s in _MBIT_S.items():
        share = total_bytes * mbit_s // sum(_MBIT_S.values())
        command = [sys.executable, "-c", _SEND, box.address(name), str(share)]
        port = int(_first_line(box.popen(name, command, stdout=subprocess.PIPE, text=True)))
        addresses.append(f"{box.address(name)}:{port}")
    return total_bytes / float(_output(box, [sys.executable, "-c", _RECEIVE, *addresses]))


def _output(box: Lan, command: Sequence[str]) -> str:
    process = box.popen("here", command, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return str(output)


def _fetch(box: Lan, model: Path, state: Path, addresses: Sequence[str]) -> Mapping[str, Any]:
    said: Mapping[str, Any] = json.loads(
        _output(box, [sys.executable, "-c", _FETCH, str(model), str(state), *addresses])
    )
    return said


@pytest.mark.root
def test_unequal_sources_together_use_their_links(box: Lan, tmp_path: Path) -> None:
    # In memory: a busy disk would be the slowest part.
    folder = Path("/dev/shm") / box.name
    source = SourceModel(folder / "model", 0, _TENSOR_BYTES)
    try:
        addresses = []
        for name in _MBIT_S:
            store = source.put(Shelf(folder / name))
            for entry in source.manifest.files:
                if not entry.header_bytes and entry.name != "tokenizer.json":
                    store.put_whole(entry, (source.folder / entry.name).read_bytes())
            store.close()
            command = [sys.executable, "-m", "tests.integration.peer_role", str(folder / name), "0", box.address(name)]
            role = box.popen(name, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            addresses.append(json.loads(_first_line(role))["address"])
        total_bytes = sum(tensor.size_bytes for tensor in source.manifest.tensors)
        shares = []
        for attempt in range(_ATTEMPTS):
            plain_bytes_s = _plain_bytes_s(box, total_bytes)
            said = _fetch(box, source.folder, folder / f"here{attempt}", addresses)
            shutil.rmtree(folder / f"here{attempt}")
            assert total_bytes <= said["received_bytes"] <= total_bytes * 1.05
            shares.append(total_bytes / said["took_s"] / plain_bytes_s)
            if shares[-1] >= _SHARE_MIN:
                break
        assert max(shares) >= _SHARE_MIN, shares
    finally:
        shutil.rmtree(folder)
