"""Makes sure that the weights of a node's layers lie in a folder of this machine.

Sources, in this order: the coordinator's own folder where this machine sees the same files (nothing is copied),
this node's disk, then other nodes and the coordinator together. Owns the order of things; the parts are its
siblings'.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import grpc.aio

from cluster.errors import ModelError, WireError
from cluster.limits import CONFIG_BYTES_MAX, INDEX_BYTES_MAX, LOAD_STALL_TIMEOUT_S
from cluster.models.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from cluster.models.layout import owned_tensors
from cluster.models.manifest import FileEntry, Manifest, TensorRecord, from_json
from cluster.models.safetensors_header import parse_header
from cluster.models.strict_json import read_object
from cluster.quantities import format_bytes
from cluster.types import LayerRange, ModelId
from cluster.weight_service import unpack_bits
from node.weights.arrival import Arrival
from node.weights.disk import check_room
from node.weights.local import holds_slice
from node.weights.meter import Meter, ProgressCallback
from node.weights.shelf import Shelf
from node.weights.source import Source, SourceFailed
from node.weights.suppliers import Supplier
from node.weights.transfer import Transfer

_SMALL_FILES = {CONFIG_FILE: CONFIG_BYTES_MAX, "generation_config.json": CONFIG_BYTES_MAX, INDEX_FILE: INDEX_BYTES_MAX}
"""What an engine reads beside the weights. Tokenizers stay with the coordinator: nodes see no text."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class SliceRequest:
    """Which weights are needed: those of `layers` of a model known by its manifest's hash."""

    model: ModelId
    layers: LayerRange
    layer_count: int
    local_folder: Path | None  # the model's folder at the coordinator, tried here too


async def ensure_slice(
    request: SliceRequest,
    *,
    shelf: Shelf,
    channel: grpc.aio.Channel,
    peers: Mapping[str, grpc.aio.Channel] | None = None,
    progress: ProgressCallback,
    arrival: Arrival | None = None,
    stall_timeout_s: float = LOAD_STALL_TIMEOUT_S,
) -> Path:
    """Return a folder with the owned tensors, fetching what is not here from the coordinator behind `channel` and
    from `peers`, nodes by name, as far as they hold it.

    Raises ModelError (damaged or missing data, no room on the disk), NodeLost (nothing comes any more), WireError
    (the coordinator breaks the contract). Whatever arrived is kept, and a later call goes on from there. `arrival` is
    told as soon as the folder can be opened, and then of every tensor.
    """
    async with shelf.loading:
        coordinator = Source(channel, request.model, stall_timeout_s)
        others = [Source(peer, request.model, stall_timeout_s, name) for name, peer in (peers or {}).items()]
        slice_ = _Slice(request, shelf, coordinator, others, arrival or Arrival())
        try:
            async with slice_.meter.reporting(progress, slice_.received_bytes):
                return await slice_.ensure()
        finally:
            slice_.store.close()


class _Slice:
    """One call of ensure_slice."""

    def __init__(
        self, request: SliceRequest, shelf: Shelf, coordinator: Source, peers: list[Source], arrival: Arrival
    ) -> None:
        self.request = request
        self.arrival = arrival
        self.coordinator = coordinator
        self.peers = peers
        self.suppliers: list[tuple[Source, Supplier]] = []
        self.shelf = shelf
        self.store = shelf.store(request.model)
        self.meter = Meter()
        self.manifest: Manifest
        self.owned: tuple[TensorRecord, ...] = ()
        self.cancelled = False

    async def ensure(self) -> Path:
        self.manifest = await self._get_manifest()
        local = self.request.local_folder
        if local is not None and await self._is_usable(local):
            await self._in_thread(self.store.note_in_place, local)
            await self._in_thread(self.store.touch)
            return local
        await self._in_thread(self.store.open, self.manifest)
        await self._in_thread(self.store.touch)
        await self._ask_around()
        await self._get_small_files()
        await self._choose(self.store.folder)
        missing = [tensor for tensor in self.owned if not self.store.is_verified(tensor)]
        self.meter.done_bytes = self.meter.total_bytes - sum(tensor.size_bytes for tensor in missing)
        await self._get_headers(sum(tensor.size_bytes - self.store.received_bytes(tensor) for tensor in missing))
        late = {tensor.name for tensor in missing}
        self.arrival.begin(self.store.folder, {tensor.name for tensor in self.owned} - late, late)
        transfer = Transfer(self.store, self.suppliers, self.meter, self._in_thread, self.arrival.came)
        bad = await transfer.fetch(missing)
        if bad:
            raise ModelError(
                f"tensor {bad[0].name} in {bad[0].file}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} "
                "arrived twice with other bytes than the coordinator announced: the file changed or is damaged there. "
                "Restart `potluck serve`; if that does not help, download the model again"
            )
        await self._in_thread(self.store.touch)
        return self.store.folder

    async def _get_manifest(self) -> Manifest:
        manifest = await self._in_thread(self.store.manifest)
        if manifest is None:
            try:
                data = await self.coordinator.manifest()
            except SourceFailed as failure:
                raise failure.error from None
            manifest = await self._in_thread(from_json, data, self.request.model)
            await self._in_thread(self.store.save_manifest, data)
        return manifest

    async def _is_usable(self, folder: Path) -> bool:
        small = [entry for entry in self.manifest.files if entry.name in _SMALL_FILES]
        weights = [entry for entry in self.manifest.files if entry.header_bytes]
        # The configuration decides which tensors are owned, so it has to be the right one before it is read.
        if not await self._in_thread(holds_slice, folder, small, weights, (), self.shelf.hashes, lambda _: None):
            return False
        await self._choose(folder)
        usable = await self._in_thread(holds_slice, folder, (), (), self.owned, self.shelf.hashes, self._advance)
        self.meter.done_bytes = self.meter.total_bytes if usable else 0
        return usable

    def _advance(self, count: int) -> None:
        if self.cancelled:
            raise ModelError("the load was cancelled")  # ends a reading of many GiB in its thread
        self.meter.add_done(count)

    async def _choose(self, folder: Path) -> None:
        """Find out from the configuration which tensors are owned."""
        config = await self._in_thread(read_object, folder / CONFIG_FILE, CONFIG_BYTES_MAX)
        stored = {tensor.name: tensor.stored() for tensor in self.manifest.tensors}
        checkpoint = Checkpoint(folder, config, stored)
        names = {tensor.name for tensor in owned_tensors(checkpoint, self.request.layers, self.request.layer_count)}
        self.owned = tuple(tensor for tensor in self.manifest.tensors if tensor.name in names)
        self.meter.total_bytes = sum(tensor.size_bytes for tensor in self.owned)

    async def _get_small_files(self) -> None:
        for entry in self.manifest.files:
            if entry.name in _SMALL_FILES and not await self._in_thread(self.store.has_whole, entry):
                if entry.size_bytes > _SMALL_FILES[entry.name]:
                    raise ModelError(f"{entry.name} has {format_bytes(entry.size_bytes)}; is this the right file?")
                check_room(self.store.folder, entry.size_bytes)
                data = await self._read_checked(entry, entry.size_bytes, entry.sha256)
                await self._in_thread(self.store.put_whole, entry, data)

    async def _get_headers(self, tensor_bytes: int) -> None:
        """Headers of all weight files, owned or not: an engine opens each one. Checks the room for everything."""
        files = [entry for entry in self.manifest.files if entry.header_bytes]
        missing = [entry for entry in files if not await self._in_thread(self.store.has_header, entry)]
        needed_bytes = tensor_bytes + sum(entry.header_bytes for entry in missing)
        wanted_bytes = self.meter.total_bytes + sum(entry.header_bytes for entry in files)
        await self._in_thread(self.shelf.make_room, self.store, self.owned, wanted_bytes, needed_bytes)
        check_room(self.store.folder, needed_bytes)
        for entry in missing:
            data = await self._read_checked(entry, entry.header_bytes, entry.header_sha256)
            await self._in_thread(self._check_header, entry, data)
            await self._in_thread(self.store.put_header, entry, data)

    def _check_header(self, entry: FileEntry, data: bytes) -> None:
        """The engine will read where the header says; the bytes are fetched to where the manifest says."""
        found = {
            (t.name, t.dtype, t.shape, t.begin, t.end)
            for t in parse_header(data, entry.size_bytes, entry.name).values()
        }
        for t in self.manifest.tensors:
            if t.file == entry.name and (t.name, t.dtype, t.shape, t.begin, t.end) not in found:
                raise WireError(f"the manifest places tensor {t.name} where the header of {entry.name} does not")

    async def _ask_around(self) -> None:
        """Find out which nodes hold something of the model. One that does not answer is no source."""
        answers = await asyncio.gather(*(peer.holdings() for peer in self.peers))
        names = [tensor.name for tensor in self.manifest.tensors]
        for peer, packed in zip(self.peers, answers, strict=True):
            flags = unpack_bits(packed, len(names)) or []
            if held := frozenset(name for name, flag in zip(names, flags, strict=False) if flag):
                self.suppliers.append((peer, Supplier(is_coordinator=False, holds=held)))
        self.suppliers.append((self.coordinator, Supplier(is_coordinator=True, holds=None)))

    def received_bytes(self) -> int:
        return self.coordinator.received_bytes + sum(peer.received_bytes for peer in self.peers)

    async def _read_checked(self, entry: FileEntry, count: int, sha256: str) -> bytes:
        """The first `count` bytes of a file, from a node if one delivers them right, else from the coordinator."""
        for source, supplier in self.suppliers:
            if supplier.left_out:
                continue
            data = bytearray()
            try:
                async with contextlib.aclosing(source.read(entry.name, 0, count)) as pieces:
                    async for piece in pieces:
                        data += piece
            except SourceFailed as failure:
                if source.is_coordinator:
                    raise failure.error from None
                supplier.left_out = True
                continue
            if hashlib.sha256(data).hexdigest() == sha256:
                return bytes(data)
            supplier.left_out = True
        raise ModelError(f"{entry.name} changed at the coordinator after it started; restart `potluck serve`")

    async def _in_thread(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Like asyncio.to_thread, but a cancelled call waits for its thread: nothing writes here afterwards."""
        running = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self.cancelled = True
            await asyncio.wait([running])
            running.exception()  # whatever it was, the cancellation comes first
            raise
