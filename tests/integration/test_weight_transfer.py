"""A node that has nothing gets its layers from the coordinator over real gRPC: exactly them, and the right ones."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.errors import ModelError, NodeLost, PotluckError, WireError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.models.manifest import TensorRecord, assemble, build_manifest
from cluster.transport import Credentials
from cluster.types import LayerRange, ModelId
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc
from node.weights.fetch import SliceRequest, ensure_slice
from node.weights.journal import read_journal
from node.weights.meter import FetchProgress
from node.weights.shelf import Shelf
from tests.integration.weight_roles import LAYERS, Coordinator, run, serving
from tests.weight_files import write_model

_ROOT = Path(__file__).parents[2]
_TENSOR_BYTES = 256 * 1024
_MIDDLE = LayerRange(2, 4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", layers=LAYERS, tensor_bytes=_TENSOR_BYTES, shards=3)


async def _fetch(
    coordinator: Coordinator,
    state: Path | Shelf,
    layers: LayerRange = _MIDDLE,
    local_folder: Path | None = None,
    stall_s: float = 20.0,
) -> tuple[Path, FetchProgress]:
    seen: list[FetchProgress] = []
    shelf = state if isinstance(state, Shelf) else Shelf(state)
    channel = Credentials().channel(coordinator.address)
    request = SliceRequest(coordinator.manifest.id, layers, LAYERS, local_folder)
    try:
        folder = await ensure_slice(
            request, shelf=shelf, channel=channel, progress=seen.append, stall_timeout_s=stall_s
        )
    finally:
        await channel.close()
    assert seen[-1].done_bytes == seen[-1].total_bytes
    return folder, seen[-1]


def _owned(coordinator: Coordinator, model: Path, layers: LayerRange = _MIDDLE) -> list[TensorRecord]:
    names = {tensor.name for tensor in owned_tensors(open_checkpoint(model), layers, LAYERS)}
    return [tensor for tensor in coordinator.manifest.tensors if tensor.name in names]


def _bytes_of(folder: Path, tensor: TensorRecord) -> bytes:
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.begin)
        return file.read(tensor.size_bytes)


@pytest.mark.parametrize("layers", [LayerRange(0, 2), _MIDDLE, LayerRange(4, 6), LayerRange(0, 6)], ids=str)
def test_the_owned_tensors_arrive_and_hardly_anything_else(model: Path, tmp_path: Path, layers: LayerRange) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            folder, progress = await _fetch(coordinator, tmp_path / "state", layers)
            owned = _owned(coordinator, model, layers)
            for tensor in coordinator.manifest.tensors:
                expected = _bytes_of(model, tensor) if tensor in owned else bytes(tensor.size_bytes)
                assert _bytes_of(folder, tensor) == expected, tensor.name
            slice_bytes = sum(tensor.size_bytes for tensor in owned)
            assert slice_bytes <= progress.received_bytes == coordinator.sent_bytes <= slice_bytes * 1.05

    run(test)


def test_tensors_of_others_take_no_room_on_the_disk(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            folder, _ = await _fetch(coordinator, tmp_path / "state")
            slice_bytes = sum(tensor.size_bytes for tensor in _owned(coordinator, model))
            allocated = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
            assert slice_bytes <= allocated <= slice_bytes * 1.05 + 64 * 1024  # whole file-system blocks at the ends

    run(test)


def test_the_folder_opens_like_any_checkpoint(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            folder, _ = await _fetch(coordinator, tmp_path / "state")
            assert open_checkpoint(folder).tensors == open_checkpoint(model).tensors
            assert not (folder / "tokenizer.json").exists(), "nodes see no text"

    run(test)


def test_neighbouring_tensors_are_asked_for_together(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            await _fetch(coordinator, tmp_path / "state", LayerRange(0, 6))
            tensors = [read for read in coordinator.reads if read[1] > 0]
            assert len(tensors) == 3  # one for each file

    run(test)


def test_a_second_load_needs_no_coordinator_at_all(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            first, _ = await _fetch(coordinator, tmp_path / "state")
        again, progress = await _fetch(coordinator, tmp_path / "state")
        assert (again, progress.received_bytes) == (first, 0)

    run(test)


def test_another_slice_fetches_only_what_it_adds(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            await _fetch(coordinator, tmp_path / "state", LayerRange(2, 4))
            folder, progress = await _fetch(coordinator, tmp_path / "state", LayerRange(3, 5))
            assert progress.received_bytes == 2 * _TENSOR_BYTES
            for tensor in _owned(coordinator, model, LayerRange(3, 5)):
                assert _bytes_of(folder, tensor) == _bytes_of(model, tensor)

    run(test)


def test_a_folder_that_the_node_sees_too_is_used_where_it_is(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            folder, progress = await _fetch(coordinator, tmp_path / "state", local_folder=model)
            assert folder == model
            assert coordinator.reads == []
            assert progress.total_bytes == 4 * _TENSOR_BYTES
            assert not list((tmp_path / "state").rglob("*.safetensors"))

    run(test)


def test_other_weights_at_the_coordinators_path_are_not_mistaken_for_its_own(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        theirs = write_model(tmp_path / "theirs", layers=LAYERS, tensor_bytes=_TENSOR_BYTES, shards=3, seed=7)
        async with serving(model) as coordinator:
            folder, _ = await _fetch(coordinator, tmp_path / "state", local_folder=theirs)
            assert folder != theirs
            for tensor in _owned(coordinator, model):
                assert _bytes_of(folder, tensor) == _bytes_of(model, tensor)

    run(test)


def test_a_new_slice_takes_the_room_of_the_model_that_was_used_longest_ago(model: Path, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "state", 10 * _TENSOR_BYTES)  # two slices of four tensors, not three
    other = write_model(tmp_path / "other", layers=LAYERS, tensor_bytes=_TENSOR_BYTES, seed=1)
    third = write_model(tmp_path / "third", layers=LAYERS, tensor_bytes=_TENSOR_BYTES, seed=2)

    async def test() -> None:
        async with serving(model) as first, serving(other) as second, serving(third) as last:
            for coordinator in (first, second, first, last):
                await _fetch(coordinator, shelf)
            assert [store.model for store in shelf.stores()] == [first.manifest.id, last.manifest.id]

    run(test)


# -- Broken off ------------------------------------------------------------------------------------------


def _role(coordinator: Coordinator, state: Path, *flags: str) -> list[str]:
    arguments = (coordinator.address, coordinator.manifest.id, str(_MIDDLE.first), str(_MIDDLE.last), str(state))
    return [sys.executable, "-m", "tests.integration.fetch_role", *arguments, *flags]


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
        write_model(model / "single", layers=LAYERS, tensor_bytes=_TENSOR_BYTES, shards=1)
        async with serving(model / "single", twist=stall) as coordinator:
            node = await asyncio.create_subprocess_exec(*_role(coordinator, tmp_path / "state"), cwd=_ROOT)
            try:
                await stalled.wait()
                await _until_written(tmp_path / "state", sent_before_kill)
            finally:
                os.kill(node.pid, signal.SIGKILL)
                await node.wait()
            before = coordinator.sent_bytes
            folder, progress = await _fetch(coordinator, tmp_path / "state")
            assert progress.received_bytes == coordinator.sent_bytes - before == 4 * _TENSOR_BYTES - sent_before_kill
            for tensor in _owned(coordinator, model / "single"):
                assert _bytes_of(folder, tensor) == _bytes_of(model / "single", tensor)

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
            _, progress = await _fetch(coordinator, tmp_path / "state")
            assert broken
            assert progress.received_bytes == coordinator.sent_bytes <= 4 * _TENSOR_BYTES * 1.05

    run(test)


def test_a_cancelled_load_gives_its_transfers_back(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model, twist=_slow, streams_max=2) as coordinator:
            for _ in range(3):
                load = asyncio.create_task(_fetch(coordinator, tmp_path / "state"))
                await coordinator.tensors_asked_for.wait()
                load.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await load
                coordinator.tensors_asked_for.clear()
            await _fetch(coordinator, tmp_path / "state")

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
            loads = [_fetch(coordinator, tmp_path / f"state{i}", LayerRange(2 * i, 2 * i + 2)) for i in range(3)]
            await asyncio.gather(*loads)
            assert len(coordinator.reads) > 3 * 8  # some were refused

    run(test)


# -- Wrong bytes -----------------------------------------------------------------------------------------


def test_a_bit_that_flips_at_the_source_is_named_and_the_rest_is_kept(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            tensor = _owned(coordinator, model)[2]
            right = _bytes_of(model, tensor)
            _overwrite(model, tensor, bytes([right[0] ^ 1]))
            with pytest.raises(ModelError, match=f"{tensor.name} in {tensor.file}"):
                await _fetch(coordinator, tmp_path / "state")
            _overwrite(model, tensor, right)
            folder, progress = await _fetch(coordinator, tmp_path / "state")
            assert progress.received_bytes == tensor.size_bytes
            assert _bytes_of(folder, tensor) == right

    run(test)


def _overwrite(folder: Path, tensor: TensorRecord, data: bytes) -> None:
    with (folder / tensor.file).open("r+b") as file:
        file.seek(tensor.begin)
        file.write(data)


def test_damage_on_the_way_costs_that_tensor_alone_a_second_transfer(model: Path, tmp_path: Path) -> None:
    damaged: list[str] = []

    async def damage_once(
        request: pb.ReadFileRequest, _context: object, pieces: AsyncIterator[pb.Bytes]
    ) -> AsyncIterator[pb.Bytes]:
        async for piece in pieces:
            if request.offset > 0 and not damaged:
                damaged.append(request.file)
                piece = pb.Bytes(data=bytes([piece.data[0] ^ 1]) + piece.data[1:])
            yield piece

    async def test() -> None:
        async with serving(model, twist=damage_once) as coordinator:
            folder, progress = await _fetch(coordinator, tmp_path / "state")
            assert 5 * _TENSOR_BYTES < progress.received_bytes < 5.1 * _TENSOR_BYTES
            for tensor in _owned(coordinator, model):
                assert _bytes_of(folder, tensor) == _bytes_of(model, tensor)

    run(test)


async def _short(_r: object, _c: object, pieces: AsyncIterator[pb.Bytes]) -> AsyncIterator[pb.Bytes]:
    async for piece in pieces:
        yield pb.Bytes(data=piece.data[:-1])


async def _long(_r: object, _c: object, pieces: AsyncIterator[pb.Bytes]) -> AsyncIterator[pb.Bytes]:
    async for piece in pieces:
        yield piece
    yield pb.Bytes(data=b"more")


async def _empty(_r: object, _c: object, _pieces: AsyncIterator[pb.Bytes]) -> AsyncIterator[pb.Bytes]:
    while True:
        yield pb.Bytes()


async def _silent(_r: object, _c: object, pieces: AsyncIterator[pb.Bytes]) -> AsyncIterator[pb.Bytes]:
    async for piece in pieces:
        await asyncio.sleep(60)
        yield piece


async def _gone(_r: object, context: Any, pieces: AsyncIterator[pb.Bytes]) -> AsyncIterator[pb.Bytes]:
    async for piece in pieces:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the cable is out")
        yield piece


@pytest.mark.parametrize(
    ("twist", "kind", "words"),
    [
        (_short, WireError, "ended config.json at byte"),
        (_long, WireError, "sent more of config.json"),
        (_empty, WireError, "empty piece"),
        (_silent, NodeLost, "no weights came from the coordinator for 1 s"),
        (_gone, NodeLost, "for 1 s: the cable is out"),
    ],
)
def test_a_source_that_breaks_the_contract_or_stops_is_an_error_in_time(
    model: Path, tmp_path: Path, twist: Any, kind: type[PotluckError], words: str
) -> None:
    async def test() -> None:
        async with serving(model, twist=twist) as coordinator:
            with pytest.raises(kind, match=words):
                await _fetch(coordinator, tmp_path / "state", stall_s=1.0)

    run(test)


def test_a_file_that_became_shorter_at_the_source_is_named(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            tensor = _owned(coordinator, model)[-1]
            os.truncate(model / tensor.file, tensor.end - 10)
            with pytest.raises(ModelError, match=f"{tensor.file}.*became shorter"):
                await _fetch(coordinator, tmp_path / "state")

    run(test)


def test_a_configuration_that_changed_at_the_source_is_named(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            data = (model / "config.json").read_bytes()
            (model / "config.json").write_bytes(data.replace(b"false", b"true "))
            with pytest.raises(ModelError, match=r"config\.json changed"):
                await _fetch(coordinator, tmp_path / "state")

    run(test)


def test_a_manifest_that_disagrees_with_the_files_headers_is_refused(model: Path, tmp_path: Path) -> None:
    """The engine would read holes, as zeros, where the header says that a tensor lies."""
    honest = build_manifest(open_checkpoint(model), name="tiny", revision="local")
    first, second, *others = honest.tensors
    swapped = (replace(first, name=second.name), replace(second, name=first.name), *others)
    lying = assemble("tiny", "local", honest.files, swapped)

    async def test() -> None:
        async with serving(model, manifest=lying) as coordinator:
            with pytest.raises(WireError, match=r"the header of .* does not"):
                await _fetch(coordinator, tmp_path / "state")

    run(test)


def test_a_manifest_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    honest = build_manifest(open_checkpoint(model), name="tiny", revision="local")

    async def test() -> None:
        async with serving(model, manifest=replace(honest, id=ModelId("5" * 64))) as coordinator:
            with pytest.raises(WireError, match="expected the manifest of model 555555555555"):
                await _fetch(coordinator, tmp_path / "state")

    run(test)


# -- What the coordinator hands out ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "offset", "length", "status"),
    [
        ("../secret", 0, 1, grpc.StatusCode.NOT_FOUND),
        ("README.md", 0, 1, grpc.StatusCode.NOT_FOUND),  # in the folder, not in the manifest
        ("/etc/passwd", 0, 1, grpc.StatusCode.NOT_FOUND),
        ("", 0, 1, grpc.StatusCode.NOT_FOUND),
        ("config.json", 0, 0, grpc.StatusCode.INVALID_ARGUMENT),
        ("config.json", 0, 10**9, grpc.StatusCode.INVALID_ARGUMENT),
        ("config.json", 2**64 - 1, 1, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_only_ranges_of_the_models_own_files_are_read(
    model: Path, file: str, offset: int, length: int, status: grpc.StatusCode
) -> None:
    (model.parent / "secret").write_text("secret")
    assert asyncio.run(_status_of(model, None, file, offset, length)) == status


def test_a_model_that_is_not_served_is_not_found(model: Path) -> None:
    status = asyncio.run(_status_of(model, ModelId("0" * 64), "config.json", 0, 1))
    assert status == grpc.StatusCode.NOT_FOUND


async def _status_of(model: Path, model_id: ModelId | None, file: str, offset: int, length: int) -> grpc.StatusCode:
    async with serving(model) as coordinator, Credentials().channel(coordinator.address) as channel:
        request = pb.ReadFileRequest(
            model_id=model_id or coordinator.manifest.id, file=file, offset=offset, length=length
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.WeightsStub(channel).ReadFile(request).read()
        return caught.value.code()


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
            [said] = await _said(_on_a_small_disk(state, "512k", _role(coordinator, state)))
            assert said["kind"] == "ModelError"
            assert "too little" in said["error"]
            assert "--state" in said["error"]
            assert coordinator.sent_bytes < _TENSOR_BYTES

    run(test)


@pytest.mark.root
def test_a_disk_that_fills_up_meanwhile_loses_nothing_that_arrived(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model, twist=_slower) as coordinator:
            state = tmp_path / "state"
            full, after = await _said(_on_a_small_disk(state, "2m", _role(coordinator, state, "--fill")))
            assert full["kind"] == "ModelError"
            assert "is full" in full["error"]
            assert 0 < after["received_bytes"] < 4 * _TENSOR_BYTES - 100_000

    run(test)
