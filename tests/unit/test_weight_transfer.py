"""One slice from several sources, some of which deliver wrong bytes: sources in memory, a store on disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from cluster.models.checkpoint import open_checkpoint
from cluster.models.manifest import build_manifest
from node.weights.meter import Meter
from node.weights.source import Source
from node.weights.store import Store
from node.weights.suppliers import Supplier
from node.weights.transfer import Transfer
from tests.weight_files import write_model

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Folder:
    """As much of a source as a transfer uses: reads a folder, and turns one bit of each run if it `lies`."""

    def __init__(self, name: str, folder: Path, *, lies: bool = False) -> None:
        self.name = name
        self.received_bytes = 0
        self.runs = 0
        self._folder = folder
        self._lies = lies

    async def read(self, file: str, begin: int, end: int) -> AsyncGenerator[bytes, None]:
        data = bytearray((self._folder / file).read_bytes()[begin:end])
        data[0] ^= self._lies
        self.runs += 1
        self.received_bytes += len(data)
        yield bytes(data)


async def _at_once(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """No thread, so that runs begun together end in the same turn of the event loop."""
    return function(*args, **kwargs)


def test_two_wrong_runs_of_one_node_that_end_together_cost_that_node_alone(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", shards=4)  # a run for each file
    manifest = build_manifest(open_checkpoint(model), name="m", revision="r")
    names = {tensor.name for tensor in manifest.tensors}
    bad, good, coordinator = _Folder("bad", model, lies=True), _Folder("good", model), _Folder("coordinator", model)
    sources = [
        (cast(Source, bad), Supplier(is_coordinator=False, holds=names)),
        (cast(Source, good), Supplier(is_coordinator=False, holds=names)),
        (cast(Source, coordinator), Supplier(is_coordinator=True, holds=None)),
    ]
    store = Store(tmp_path / "models", manifest.id)
    store.open(manifest)
    try:
        transfer = Transfer(store, sources, Meter(), _at_once, lambda _names: None)
        assert asyncio.run(transfer.fetch(manifest.tensors)) == []
        assert bad.runs == 2, "both were under way when the first was found wrong"
        assert all(store.is_verified(tensor) for tensor in manifest.tensors)
    finally:
        store.close()
