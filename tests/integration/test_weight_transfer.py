"""A node that has nothing gets its layers from the coordinator over real gRPC: exactly them, and the right ones."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from cluster.models.checkpoint import open_checkpoint
from cluster.transport import Credentials
from cluster.types import LayerRange, ModelId
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc
from node.weights.shelf import Shelf
from tests.integration.weight_fetching import (
    MIDDLE,
    TENSOR_BYTES,
    bytes_of,
    fetch_slice,
    owned_by_slice,
    transfer_model,
)
from tests.integration.weight_roles import LAYERS, run, serving
from tests.weight_files import write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return transfer_model(tmp_path / "model")


@pytest.mark.parametrize("layers", [LayerRange(0, 2), MIDDLE, LayerRange(4, 6), LayerRange(0, 6)], ids=str)
def test_the_owned_tensors_arrive_and_hardly_anything_else(model: Path, tmp_path: Path, layers: LayerRange) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            folder, progress = await fetch_slice(coordinator, tmp_path / "state", layers)
            owned = owned_by_slice(coordinator, model, layers)
            for tensor in coordinator.manifest.tensors:
                expected = bytes_of(model, tensor) if tensor in owned else bytes(tensor.size_bytes)
                assert bytes_of(folder, tensor) == expected, tensor.name
            slice_bytes = sum(tensor.size_bytes for tensor in owned)
            assert slice_bytes <= progress.received_bytes == coordinator.sent_bytes <= slice_bytes * 1.05

    run(test)


def test_tensors_of_others_take_no_room_on_the_disk(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            folder, _ = await fetch_slice(coordinator, tmp_path / "state")
            slice_bytes = sum(tensor.size_bytes for tensor in owned_by_slice(coordinator, model))
            allocated = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
            assert slice_bytes <= allocated <= slice_bytes * 1.05 + 64 * 1024  # whole file-system blocks at the ends

    run(test)


def test_the_folder_opens_like_any_checkpoint(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            folder, _ = await fetch_slice(coordinator, tmp_path / "state")
            assert open_checkpoint(folder).tensors == open_checkpoint(model).tensors
            assert not (folder / "tokenizer.json").exists(), "nodes see no text"

    run(test)


def test_neighbouring_tensors_are_asked_for_together(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            await fetch_slice(coordinator, tmp_path / "state", LayerRange(0, 6))
            tensors = [read for read in coordinator.reads if read[1] > 0]
            assert len(tensors) == 3  # one for each file

    run(test)


def test_a_second_load_needs_no_coordinator_at_all(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            first, _ = await fetch_slice(coordinator, tmp_path / "state")
        again, progress = await fetch_slice(coordinator, tmp_path / "state")
        assert (again, progress.received_bytes) == (first, 0)

    run(test)


def test_another_slice_fetches_only_what_it_adds(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            await fetch_slice(coordinator, tmp_path / "state", LayerRange(2, 4))
            folder, progress = await fetch_slice(coordinator, tmp_path / "state", LayerRange(3, 5))
            assert progress.received_bytes == 2 * TENSOR_BYTES
            for tensor in owned_by_slice(coordinator, model, LayerRange(3, 5)):
                assert bytes_of(folder, tensor) == bytes_of(model, tensor)

    run(test)


def test_a_folder_that_the_node_sees_too_is_used_where_it_is(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            folder, progress = await fetch_slice(coordinator, tmp_path / "state", local_folder=model)
            assert folder == model
            assert coordinator.reads == []
            assert progress.total_bytes == 4 * TENSOR_BYTES
            assert not list((tmp_path / "state").rglob("*.safetensors"))

    run(test)


def test_other_weights_at_the_coordinators_path_are_not_mistaken_for_its_own(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        theirs = write_model(tmp_path / "theirs", layers=LAYERS, tensor_bytes=TENSOR_BYTES, shards=3, seed=7)
        async with serving(model) as coordinator:
            folder, _ = await fetch_slice(coordinator, tmp_path / "state", local_folder=theirs)
            assert folder != theirs
            for tensor in owned_by_slice(coordinator, model):
                assert bytes_of(folder, tensor) == bytes_of(model, tensor)

    run(test)


def test_a_new_slice_takes_the_room_of_the_model_that_was_used_longest_ago(model: Path, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "state", 10 * TENSOR_BYTES)  # two slices of four tensors, not three
    other = write_model(tmp_path / "other", layers=LAYERS, tensor_bytes=TENSOR_BYTES, seed=1)
    third = write_model(tmp_path / "third", layers=LAYERS, tensor_bytes=TENSOR_BYTES, seed=2)

    async def test() -> None:
        async with serving(model) as first, serving(other) as second, serving(third) as last:
            for coordinator in (first, second, first, last):
                await fetch_slice(coordinator, shelf)
            assert [store.model for store in shelf.stores()] == [first.manifest.id, last.manifest.id]

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
