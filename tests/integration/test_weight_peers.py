"""Nodes give each other what they hold: from several sources at once, without the coordinator, through a kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.transport import Credentials
from cluster.types import LayerRange
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc
from node.weights.shelf import Shelf
from tests.integration.weight_roles import LAYERS, Coordinator, run, serving
from tests.stored_weights import SourceModel

_ROOT = Path(__file__).parents[2]
_TENSOR_BYTES = 1024 * 1024
_ALL, _FIRST, _SECOND = LayerRange(0, LAYERS), LayerRange(0, 3), LayerRange(3, LAYERS)


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    return SourceModel(tmp_path / "model", 0, _TENSOR_BYTES)


def _put(source: SourceModel, state: Path, layers: LayerRange) -> None:
    """Let the store at `state` hold `layers`, small files and headers included."""
    names = {tensor.name for tensor in owned_tensors(open_checkpoint(source.folder), layers, LAYERS)}
    store = source.put(Shelf(state), [tensor for tensor in source.manifest.tensors if tensor.name in names])
    for entry in source.manifest.files:
        if not entry.header_bytes and entry.name != "tokenizer.json":
            store.put_whole(entry, (source.folder / entry.name).read_bytes())
    store.close()


class _Peer:
    """A peer_role process."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address

    async def order(self, coordinator: Coordinator, layers: LayerRange, *peers: str) -> None:
        document = {"coordinator": coordinator.address, "model": coordinator.manifest.id}
        document |= {"layers": [layers.first, layers.last], "peers": list(peers)}  # type: ignore[dict-item]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(document).encode() + b"\n")
        await self.process.stdin.drain()

    async def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line: dict[str, Any] = json.loads(await self.process.stdout.readline())
        return line

    async def outcome(self) -> dict[str, Any]:
        while True:
            said = await self.said()
            if "folder" in said or "error" in said:
                return said

    async def fetch(self, coordinator: Coordinator, layers: LayerRange, *peers: str) -> dict[str, Any]:
        await self.order(coordinator, layers, *peers)
        return await self.outcome()


@asynccontextmanager
async def _peer(state: Path, pause_s: float = 0.0) -> AsyncIterator[_Peer]:
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    command = [sys.executable, "-m", "tests.integration.peer_role", str(state), str(pause_s)]
    process = await asyncio.create_subprocess_exec(*command, cwd=_ROOT, **pipes)
    peer = _Peer(process, "")
    try:
        peer.address = (await peer.said())["address"]
        yield peer
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _check(source: SourceModel, said: dict[str, Any], layers: LayerRange) -> None:
    """The slice is right, and hardly more than it came over the network."""
    assert "folder" in said, said
    for tensor in owned_tensors(open_checkpoint(source.folder), layers, LAYERS):
        at_source = (source.folder / tensor.file).read_bytes()[tensor.begin : tensor.end]
        assert (Path(said["folder"]) / tensor.file).read_bytes()[tensor.begin : tensor.end] == at_source, tensor.name
    assert said["received_bytes"] <= said["total_bytes"] * 1.05


async def _refuse(
    _request: pb.ReadFileRequest, context: Any, pieces: AsyncIterator[pb.Bytes]
) -> AsyncIterator[pb.Bytes]:
    await context.abort(grpc.StatusCode.DATA_LOSS, "the disk is gone")
    async for piece in pieces:
        yield piece


async def _slow(_request: pb.ReadFileRequest, _c: Any, pieces: AsyncIterator[pb.Bytes]) -> AsyncIterator[pb.Bytes]:
    async for piece in pieces:
        for begin in range(0, len(piece.data), 128 * 1024):
            yield pb.Bytes(data=piece.data[begin : begin + 128 * 1024])
            await asyncio.sleep(0.03)


def test_a_node_gets_its_slice_from_another_while_the_coordinator_refuses(source: SourceModel, tmp_path: Path) -> None:
    _put(source, tmp_path / "a", _ALL)

    async def test() -> None:
        async with (
            serving(source.folder, twist=_refuse) as coordinator,
            _peer(tmp_path / "a") as a,
            _peer(tmp_path / "b") as b,
        ):
            _check(source, await b.fetch(coordinator, _SECOND, a.address), _SECOND)
            assert coordinator.sent_bytes < _TENSOR_BYTES / 20  # the manifest

    run(test)


def test_two_nodes_pull_from_each_other_at_the_same_time(source: SourceModel, tmp_path: Path) -> None:
    _put(source, tmp_path / "a", _FIRST)
    _put(source, tmp_path / "b", _SECOND)

    async def test() -> None:
        async with (
            serving(source.folder, twist=_refuse) as coordinator,
            _peer(tmp_path / "a", 0.01) as a,
            _peer(tmp_path / "b", 0.01) as b,
        ):
            both = await asyncio.gather(a.fetch(coordinator, _ALL, b.address), b.fetch(coordinator, _ALL, a.address))
            for said in both:
                _check(source, said, _ALL)
                assert said["received_bytes"] >= 6 * _TENSOR_BYTES

    run(test)


def test_a_source_killed_in_the_middle_fails_nothing_and_costs_nothing_twice(
    source: SourceModel, tmp_path: Path
) -> None:
    _put(source, tmp_path / "a", _ALL)

    async def test() -> None:
        async with (
            serving(source.folder, twist=_slow) as coordinator,
            _peer(tmp_path / "a", 0.02) as a,
            _peer(tmp_path / "b") as b,
        ):
            await b.order(coordinator, _ALL, a.address)
            while (await b.said())["received_bytes"] < 2 * _TENSOR_BYTES:
                pass
            os.kill(a.process.pid, signal.SIGKILL)
            before = coordinator.sent_bytes
            _check(source, await b.outcome(), _ALL)
            assert coordinator.sent_bytes > before

    run(test)


@pytest.mark.parametrize("pause_s", [1.0, 60.0], ids=["crawls", "is silent"])
def test_a_fast_source_takes_over_from_one_that_hardly_delivers(
    source: SourceModel, tmp_path: Path, pause_s: float
) -> None:
    _put(source, tmp_path / "a", _ALL)

    async def test() -> None:
        async with (
            serving(source.folder) as coordinator,
            _peer(tmp_path / "a", pause_s) as a,
            _peer(tmp_path / "b") as b,
        ):
            # At one piece a second, each of its runs of 4 MiB would take half a minute.
            _check(source, await asyncio.wait_for(b.fetch(coordinator, _ALL, a.address), 20), _ALL)

    run(test)


def test_several_sources_deliver_at_once(source: SourceModel, tmp_path: Path) -> None:
    _put(source, tmp_path / "a", _ALL)
    _put(source, tmp_path / "c", _ALL)

    async def test() -> None:
        async with (
            serving(source.folder, twist=_slow) as coordinator,
            _peer(tmp_path / "a", 0.03) as a,
            _peer(tmp_path / "c", 0.03) as c,
            _peer(tmp_path / "b") as b,
        ):
            said = await b.fetch(coordinator, _ALL, a.address, c.address)
            _check(source, said, _ALL)
            assert 0 < coordinator.sent_bytes < said["total_bytes"] * 0.7

    run(test)


def test_a_node_whose_disk_lies_is_left_out(source: SourceModel, tmp_path: Path) -> None:
    _put(source, tmp_path / "a", _ALL)
    tensor = source.manifest.tensors[4]
    with (Shelf(tmp_path / "a").store(source.manifest.id).folder / tensor.file).open("r+b") as file:
        file.seek(tensor.begin + 77)
        file.write(b"rot")

    async def test() -> None:
        async with serving(source.folder) as coordinator, _peer(tmp_path / "a") as a, _peer(tmp_path / "b") as b:
            said = await b.fetch(coordinator, _ALL, a.address)
            said["received_bytes"] = 0  # what came wrong came twice
            _check(source, said, _ALL)

    run(test)


def test_a_node_says_how_much_it_has_sent(source: SourceModel, tmp_path: Path) -> None:
    _put(source, tmp_path / "a", _ALL)

    async def sent_bytes(address: str) -> int:
        async with Credentials().channel(address) as channel:
            stub: Any = rpc.WeightsStub(channel)
            return int((await stub.GetHoldings(pb.GetHoldingsRequest(model_id=source.manifest.id))).sent_bytes)

    async def test() -> None:
        async with (
            serving(source.folder, twist=_refuse) as coordinator,
            _peer(tmp_path / "a") as a,
            _peer(tmp_path / "b") as b,
        ):
            assert await sent_bytes(a.address) == 0
            said = await b.fetch(coordinator, _SECOND, a.address)
            sent = await sent_bytes(a.address)
            assert said["total_bytes"] <= sent <= said["received_bytes"]

    run(test)


def test_a_peer_that_is_not_there_costs_a_moment(source: SourceModel, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(source.folder) as coordinator, _peer(tmp_path / "b") as b:
            _check(source, await b.fetch(coordinator, _FIRST, "127.0.0.1:1"), _FIRST)

    run(test)


@pytest.mark.parametrize(
    ("file", "tensor", "status"),
    [("", 9, grpc.StatusCode.NOT_FOUND), ("../../journal", 0, grpc.StatusCode.NOT_FOUND)],
)
def test_only_what_is_held_is_given(
    source: SourceModel, tmp_path: Path, file: str, tensor: int, status: grpc.StatusCode
) -> None:
    _put(source, tmp_path / "a", _FIRST)
    absent = source.manifest.tensors[tensor]

    async def test() -> None:
        async with _peer(tmp_path / "a") as a, Credentials().channel(a.address) as channel:
            stub: Any = rpc.WeightsStub(channel)
            span = {"offset": absent.begin - 1, "length": 2}
            request = pb.ReadFileRequest(model_id=source.manifest.id, file=file or absent.file, **span)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ReadFile(request).read()
            assert caught.value.code() == status
            held = await stub.GetHoldings(pb.GetHoldingsRequest(model_id=source.manifest.id))
            assert 0 < int.from_bytes(held.tensors, "little").bit_count() < len(source.manifest.tensors)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.GetHoldings(pb.GetHoldingsRequest(model_id="../" * 3))

    run(test)
