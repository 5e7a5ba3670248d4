"""A node's engine loads what has arrived while the rest of its slice is still on the way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.errors import ClusterError, ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.nodes import LoadPhase, LoadReport
from cluster.plan import Assignment, Fence
from cluster.transport import Credentials
from cluster.types import Backend, DeploymentId, DType, Epoch, LayerRange, TensorSpec
from cluster.wire import node_pb2 as pb
from node import loading
from node.engine import LoadProgress, Progress, StageSpec
from node.loading import EngineChoice, StageLoader
from node.weights.shelf import Shelf
from tests.integration.weight_roles import LAYERS, Coordinator, run, serving
from tests.weight_files import write_model

_HELD_BACK = "model-00003-of-00003.safetensors"


class _Reader:
    """As much of an engine as a load takes: reads its tensors as they come, or as `read` says."""

    def __init__(self, read: Callable[[_Reader, StageSpec], None]) -> None:
        self._read = read
        self.found: dict[str, bytes] = {}
        self.loaded = threading.Event()
        self.closed = threading.Event()
        self.closed_by = ""

    def load(self, spec: StageSpec, progress: Progress) -> None:
        self._read(self, spec)
        progress(LoadProgress(1, 1))
        self.loaded.set()

    def take(self, spec: StageSpec, file: str = "") -> None:
        """Wait for every owned tensor, or those of one file, and keep what it holds then."""
        for tensor in owned_tensors(open_checkpoint(spec.folder), spec.layers, spec.layer_count):
            if not file or tensor.file == file:
                spec.await_tensors([tensor.name])
                self.found[tensor.name] = (spec.folder / tensor.file).read_bytes()[tensor.begin : tensor.end]

    def close(self) -> None:
        self.closed_by = threading.current_thread().name
        self.closed.set()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", layers=LAYERS, tensor_bytes=64 * 1024, shards=3)


def _assignment(coordinator: Coordinator) -> Assignment:
    return Assignment(
        fence=Fence(DeploymentId("d"), Epoch(1)),
        model=coordinator.manifest.id,
        stage=0,
        stage_count=1,
        layers=LayerRange(0, LAYERS),
        layer_count=LAYERS,
        boundary=(TensorSpec("hidden", DType.F32, (4,)),),
        kv_tokens=64,
        context_tokens=64,
        vocab_size=16,
        local_folder="",
        weights_address=coordinator.address,
    )


@contextmanager
def _loader(engine: _Reader, state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StageLoader]:
    monkeypatch.setattr(loading, "create_engine", lambda _backend: engine)
    monkeypatch.setattr(StageLoader, "_flow", lambda _self, loaded, _assignment: loaded)
    loader = StageLoader(EngineChoice(Backend.TORCH, "cpu", 1), Shelf(state), Credentials())
    try:
        yield loader
    finally:
        loader.close()


def _holding_back(until: asyncio.Event) -> Any:
    async def twist(request: pb.ReadFileRequest, _c: Any, pieces: AsyncIterator[pb.Bytes]) -> AsyncIterator[pb.Bytes]:
        if request.file == _HELD_BACK and request.offset:
            await until.wait()
        async for piece in pieces:
            yield piece

    return twist


def test_the_engine_reads_what_has_arrived_while_the_rest_is_held_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        release, loop = asyncio.Event(), asyncio.get_running_loop()

        def read(engine: _Reader, spec: StageSpec) -> None:
            engine.take(spec, "model-00001-of-00003.safetensors")
            loop.call_soon_threadsafe(release.set)  # nothing more comes before this
            engine.take(spec)

        engine, reports = _Reader(read), list[LoadReport]()
        async with serving(model, twist=_holding_back(release)) as coordinator:
            with _loader(engine, tmp_path / "state", monkeypatch) as loader:
                await loader.load(_assignment(coordinator), reports.append)
        for tensor in open_checkpoint(model).tensors.values():
            assert engine.found[tensor.name] == (model / tensor.file).read_bytes()[tensor.begin : tensor.end]
        phases = [report.phase for report in reports]
        assert phases == sorted(phases, key=[LoadPhase.FETCHING, LoadPhase.LOADING].index), "one after the other"

    run(test)


def test_a_transfer_that_fails_ends_the_engines_waiting(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def refuse(request: pb.ReadFileRequest, context: Any, pieces: Any) -> AsyncIterator[pb.Bytes]:
        if request.file == _HELD_BACK and request.offset:
            await begun.wait()
            await context.abort(grpc.StatusCode.DATA_LOSS, "the disk is gone")
        async for piece in pieces:
            yield piece

    async def test() -> None:
        loop = asyncio.get_running_loop()

        def read(engine: _Reader, spec: StageSpec) -> None:
            engine.take(spec, "model-00001-of-00003.safetensors")
            loop.call_soon_threadsafe(begun.set)
            engine.take(spec)

        engine = _Reader(read)
        async with serving(model, twist=refuse) as coordinator:
            with _loader(engine, tmp_path / "state", monkeypatch) as loader:
                with pytest.raises(ModelError, match="the disk is gone"):
                    await loader.load(_assignment(coordinator), lambda _: None)
                await loader.settle()
        assert engine.closed.is_set()

    run(test)


def test_a_cancelled_load_ends_the_engines_waiting(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        waiting, loop = asyncio.Event(), asyncio.get_running_loop()

        def read(engine: _Reader, spec: StageSpec) -> None:
            engine.take(spec, "model-00001-of-00003.safetensors")
            loop.call_soon_threadsafe(waiting.set)
            engine.take(spec)

        engine = _Reader(read)
        async with serving(model, twist=_holding_back(asyncio.Event())) as coordinator:
            with _loader(engine, tmp_path / "state", monkeypatch) as loader:
                load = asyncio.create_task(loader.load(_assignment(coordinator), lambda _: None))
                await waiting.wait()
                load.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await load
                await loader.settle()
        assert engine.closed.is_set()

    run(test)


def test_an_engine_that_reads_without_waiting_is_not_believed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        engine = _Reader(lambda engine, spec: engine.take(spec, _HELD_BACK))
        async with serving(model) as coordinator:
            forgotten = pytest.raises(ClusterError, match=r"did not wait for model\.embed_tokens\.weight")
            with _loader(engine, tmp_path / "state", monkeypatch) as loader, forgotten:
                await loader.load(_assignment(coordinator), lambda _: None)

    run(test)


def _ending(how: Callable[[], Awaitable[object]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches do `how` when everything is in its files."""
    ensure_slice = loading.ensure_slice

    async def ensure(*args: Any, **kwargs: Any) -> Path:
        folder = await ensure_slice(*args, **kwargs)
        await how()
        return folder

    monkeypatch.setattr(loading, "ensure_slice", ensure)


def test_an_engine_that_had_everything_is_closed_when_the_fetch_fails_at_its_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        engine = _Reader(_Reader.take)
        async with serving(model) as coordinator:
            with _loader(engine, tmp_path / "state", monkeypatch) as loader:

                async def fail() -> None:
                    await asyncio.to_thread(engine.loaded.wait)
                    raise ModelError("the disk is full")

                _ending(fail, monkeypatch)
                with pytest.raises(ModelError, match="the disk is full"):
                    await loader.load(_assignment(coordinator), lambda _: None)
                await loader.settle()
        assert engine.closed_by == "engine_0"

    run(test)


def test_an_engine_that_had_everything_is_closed_when_the_load_is_cancelled_then(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        engine = _Reader(_Reader.take)
        _ending(asyncio.Event().wait, monkeypatch)
        async with serving(model) as coordinator:
            with _loader(engine, tmp_path / "state", monkeypatch) as loader:
                load = asyncio.create_task(loader.load(_assignment(coordinator), lambda _: None))
                await asyncio.to_thread(engine.loaded.wait)
                await loader.settle()  # so the load has its engine and waits for the fetch alone
                load.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await load
                await loader.settle()
        assert engine.closed_by == "engine_0"

    run(test)
