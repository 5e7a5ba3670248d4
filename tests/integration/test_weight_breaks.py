"""A transfer of weights that is broken off, cancelled or refused, or whose disk is full, goes on where it was."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.types import LayerRange
from cluster.wire import node_pb2 as pb
from node.weights.journal import read_journal
from tests.integration.weight_fetching import (
    TENSOR_BYTES,
    bytes_of,
    fetch_command,
    fetch_slice,
    owned_by_slice,
    transfer_model,
)
from tests.integration.weight_roles import LAYERS, run, serving
from tests.weight_files import write_model

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return transfer_model(tmp_path / "model")


def test_a_killed_node_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    sent_before_kill = 700_000  # in the third of four tensors
    stalled = asyncio.Event()

    async def stall(
        request: pb.ReadFileRequest, _context: object, pieces: AsyncIterator[pb.Bytes]
    ) -> AsyncIterator[pb.Bytes]:
        if request.offset > 0 and not stalled.is_set():
            piece = await anext(pieces)
            for begin in range(0, sent_before_kill, 50_000):
                yield pb.Bytes(data=piece.data[begin : begin + 50_000])
            stalled.set()
            await asyncio.sleep(60)
        async for piece in pieces:
            yield piece

    async def test() -> None:
        # One file, so that the slice is one run.
        write_model(model / "single", layers=LAYERS, tensor_bytes=TENSOR_BYTES, shards=1)
        async with serving(model / "single", twist=stall) as coordinator:
            node = await asyncio.create_subprocess_exec(*fetch_command(coordinator, tmp_path / "state"), cwd=_ROOT)
            try:
                await stalled.wait()
                await _until_written(tmp_path / "state", sent_before_kill)
            finally:
                os.kill(node.pid, signal.SIGKILL)
                await node.wait()
            before = coordinator.sent_bytes
            folder, progress = await fetch_slice(coordinator, tmp_path / "state")
            assert progress.received_bytes == coordinator.sent_bytes - before == 4 * TENSOR_BYTES - sent_before_kill
            for tensor in owned_by_slice(coordinator, model / "single"):
                assert bytes_of(folder, tensor) == bytes_of(model / "single", tensor)

    run(test)


async def _until_written(state: Path, tensor_bytes: int) -> None:
    """Wait until the node's journal speaks of that many bytes."""
    while True:
        marks = [mark for path in state.rglob("journal") for mark in read_journal(path).values()]
        if sum(mark.received_bytes for mark in marks) == tensor_bytes:
            return
        await asyncio.sleep(0.02)


def test_a_link_that_breaks_is_taken_up_at_the_same_byte(model: Path, tmp_path: Path) -> None:
    broken: list[str] = []

    async def break_once(
        request: pb.ReadFileRequest, context: Any, pieces: AsyncIterator[pb.Bytes]
    ) -> AsyncIterator[pb.Bytes]:
        async for piece in pieces:
            if request.offset > 0 and request.file not in broken:
                broken.append(request.file)
                yield pb.Bytes(data=piece.data[:100_000])
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the cable is out")
            yield piece

    async def test() -> None:
        async with serving(model, twist=break_once) as coordinator:
            _, progress = await fetch_slice(coordinator, tmp_path / "state")
            assert broken
            assert progress.received_bytes == coordinator.sent_bytes <= 4 * TENSOR_BYTES * 1.05

    run(test)


def test_a_cancelled_load_gives_its_transfers_back(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model, twist=_slow, streams_max=2) as coordinator:
            for _ in range(3):
                load = asyncio.create_task(fetch_slice(coordinator, tmp_path / "state"))
                await coordinator.tensors_asked_for.wait()
                load.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await load
                coordinator.tensors_asked_for.clear()
            await fetch_slice(coordinator, tmp_path / "state")

    run(test)


async def _slow(
    request: pb.ReadFileRequest, _context: object, pieces: AsyncIterator[pb.Bytes]
) -> AsyncIterator[pb.Bytes]:
    async for piece in pieces:
        for begin in range(0, len(piece.data), 64 * 1024):
            yield pb.Bytes(data=piece.data[begin : begin + 64 * 1024])
            await asyncio.sleep(0.01)


async def _slower(
    request: pb.ReadFileRequest, _context: object, pieces: AsyncIterator[pb.Bytes]
) -> AsyncIterator[pb.Bytes]:
    async for piece in pieces:
        for begin in range(0, len(piece.data), 16 * 1024):
            yield pb.Bytes(data=piece.data[begin : begin + 16 * 1024])
            await asyncio.sleep(0.03)


def test_a_busy_coordinator_is_asked_again(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model, twist=_slow, streams_max=1) as coordinator:
            loads = [fetch_slice(coordinator, tmp_path / f"state{i}", LayerRange(2 * i, 2 * i + 2)) for i in range(3)]
            await asyncio.gather(*loads)
            assert len(coordinator.reads) > 3 * 8  # some were refused

    run(test)


# -- A disk without room ---------------------------------------------------------------------------------


def _on_a_small_disk(state: Path, size: str, command: list[str]) -> list[str]:
    """The command in a mount namespace of its own, with an empty disk of `size` at `state`."""
    state.mkdir(parents=True)
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    wrapped = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(state)]
    probe = subprocess.run([*wrapped, "true"], capture_output=True, text=True) if sys.platform == "linux" else None
    if probe is None or probe.returncode != 0:
        reason = probe.stderr.strip() if probe else f"this is {sys.platform}"
        pytest.skip(f"a small disk needs root and mount namespaces: {reason}")
    return [*wrapped, *command]


async def _said(command: list[str]) -> list[dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(*command, cwd=_ROOT, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.root
def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            state = tmp_path / "state"
            [said] = await _said(_on_a_small_disk(state, "512k", fetch_command(coordinator, state)))
            assert said["kind"] == "ModelError"
            assert "too little" in said["error"]
            assert "--state" in said["error"]
            assert coordinator.sent_bytes < TENSOR_BYTES

    run(test)


@pytest.mark.root
def test_a_disk_that_fills_up_meanwhile_loses_nothing_that_arrived(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model, twist=_slower) as coordinator:
            state = tmp_path / "state"
            full, after = await _said(_on_a_small_disk(state, "2m", fetch_command(coordinator, state, "--fill")))
            assert full["kind"] == "ModelError"
            assert "is full" in full["error"]
            assert 0 < after["received_bytes"] < 4 * TENSOR_BYTES - 100_000

    run(test)
