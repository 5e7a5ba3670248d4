"""Weights that arrive damaged, or from a source that breaks the contract, are never used; and errors come in time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.errors import ModelError, NodeLost, PotluckError, WireError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.manifest import TensorRecord, assemble, build_manifest
from cluster.types import ModelId
from cluster.wire import node_pb2 as pb
from tests.integration.weight_fetching import (
    TENSOR_BYTES,
    bytes_of,
    fetch_slice,
    owned_by_slice,
    transfer_model,
)
from tests.integration.weight_roles import run, serving


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return transfer_model(tmp_path / "model")


def test_a_bit_that_flips_at_the_source_is_named_and_the_rest_is_kept(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            tensor = owned_by_slice(coordinator, model)[2]
            right = bytes_of(model, tensor)
            _overwrite(model, tensor, bytes([right[0] ^ 1]))
            with pytest.raises(ModelError, match=f"{tensor.name} in {tensor.file}"):
                await fetch_slice(coordinator, tmp_path / "state")
            _overwrite(model, tensor, right)
            folder, progress = await fetch_slice(coordinator, tmp_path / "state")
            assert progress.received_bytes == tensor.size_bytes
            assert bytes_of(folder, tensor) == right

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
            folder, progress = await fetch_slice(coordinator, tmp_path / "state")
            assert 5 * TENSOR_BYTES < progress.received_bytes < 5.1 * TENSOR_BYTES
            for tensor in owned_by_slice(coordinator, model):
                assert bytes_of(folder, tensor) == bytes_of(model, tensor)

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
                await fetch_slice(coordinator, tmp_path / "state", stall_s=1.0)

    run(test)


def test_a_file_that_became_shorter_at_the_source_is_named(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            tensor = owned_by_slice(coordinator, model)[-1]
            os.truncate(model / tensor.file, tensor.end - 10)
            with pytest.raises(ModelError, match=f"{tensor.file}.*became shorter"):
                await fetch_slice(coordinator, tmp_path / "state")

    run(test)


def test_a_configuration_that_changed_at_the_source_is_named(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(model) as coordinator:
            data = (model / "config.json").read_bytes()
            (model / "config.json").write_bytes(data.replace(b"false", b"true "))
            with pytest.raises(ModelError, match=r"config\.json changed"):
                await fetch_slice(coordinator, tmp_path / "state")

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
                await fetch_slice(coordinator, tmp_path / "state")

    run(test)


def test_a_manifest_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    honest = build_manifest(open_checkpoint(model), name="tiny", revision="local")

    async def test() -> None:
        async with serving(model, manifest=replace(honest, id=ModelId("5" * 64))) as coordinator:
            with pytest.raises(WireError, match="expected the manifest of model 555555555555"):
                await fetch_slice(coordinator, tmp_path / "state")

    run(test)
