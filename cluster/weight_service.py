"""Hands out the weights of models that this process holds, whole or in part: the Weights service, which the
coordinator and every node serve alike. Reads exactly the files that a manifest names. Knows nothing of who owns
what, or of where the bytes came from; that is the Holding's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn, Protocol

import grpc
import grpc.aio

from cluster.limits import WEIGHT_CHUNK_BYTES
from cluster.wire.node_pb2 import Bytes, GetHoldingsRequest, GetManifestRequest, Holdings, ReadFileRequest
from cluster.wire.node_pb2_grpc import WeightsServicer

_READ_THREADS = 4  # a disk gives no more to a fifth reader

_Context = (
    grpc.aio.ServicerContext[GetManifestRequest, Bytes]
    | grpc.aio.ServicerContext[ReadFileRequest, Bytes]
    | grpc.aio.ServicerContext[GetHoldingsRequest, Holdings]
)


class Holding(Protocol):
    """One model, as far as it is here."""

    @property
    def manifest_json(self) -> bytes: ...

    @property
    def folder(self) -> Path: ...

    def size_bytes(self, file: str) -> int | None:
        """Of a file of the model; None for any other."""
        ...

    def holds(self, file: str, begin: int, end: int) -> bool:
        """Whether bytes [begin, end) of `file` are here and were checked. Asked again after they were read."""
        ...

    def tensors(self) -> bytes:
        """Which tensors are here, as one bit each (see pack_bits)."""
        ...


Find = Callable[[str], Holding | None]
"""The model of this id, if any of it is here. May read from disk."""


class WeightService(WeightsServicer):
    """Answers from whatever `find` finds, `streams_max` transfers at a time; the next one is told to come back."""

    def __init__(self, find: Find, streams_max: int) -> None:
        self._find = find
        self._streams_max = streams_max
        self._streams = 0
        self.sent_bytes = 0
        self._threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="weights")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def GetManifest(
        self, request: GetManifestRequest, context: grpc.aio.ServicerContext[GetManifestRequest, Bytes]
    ) -> AsyncIterator[Bytes]:
        data = (await self._held(request.model_id, context)).manifest_json
        for begin in range(0, len(data), WEIGHT_CHUNK_BYTES):
            yield Bytes(data=data[begin : begin + WEIGHT_CHUNK_BYTES])

    async def GetHoldings(
        self, request: GetHoldingsRequest, context: grpc.aio.ServicerContext[GetHoldingsRequest, Holdings]
    ) -> Holdings:
        held = await self._held(request.model_id, context)
        tensors = await asyncio.get_running_loop().run_in_executor(self._threads, held.tensors)
        return Holdings(tensors=tensors, sent_bytes=self.sent_bytes)

    async def ReadFile(
        self, request: ReadFileRequest, context: grpc.aio.ServicerContext[ReadFileRequest, Bytes]
    ) -> AsyncIterator[Bytes]:
        held = await self._held(request.model_id, context)
        await self._check(request, held, context)
        self._streams += 1
        path, position, end = held.folder / request.file, request.offset, request.offset + request.length
        try:
            while position < end:
                count = min(WEIGHT_CHUNK_BYTES, end - position)
                reading = asyncio.get_running_loop().run_in_executor(self._threads, _read, path, position, count)
                data = await reading
                if not held.holds(request.file, position, position + len(data)):
                    await _refuse(context, grpc.StatusCode.DATA_LOSS, f"{request.file} was removed to make room")
                position += len(data)
                self.sent_bytes += len(data)
                yield Bytes(data=data)
        except OSError as error:
            await _refuse(context, grpc.StatusCode.DATA_LOSS, f"cannot read {request.file}: {error.strerror or error}")
        finally:
            self._streams -= 1

    async def _check(self, request: ReadFileRequest, held: Holding, context: _Context) -> None:
        size_bytes, end = held.size_bytes(request.file), request.offset + request.length
        if size_bytes is None:
            await _refuse(context, grpc.StatusCode.NOT_FOUND, f"the model has no file {request.file[:80]!r}")
        asked = f"bytes [{request.offset}, {end}) of {request.file}"
        if request.length == 0 or end > size_bytes:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"asked for {asked}, which has {size_bytes}")
        if not held.holds(request.file, request.offset, end):
            await _refuse(context, grpc.StatusCode.NOT_FOUND, f"not all of {asked} is here")
        if self._streams >= self._streams_max:
            await _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many transfers at once; try again")

    async def _held(self, model_id: str, context: _Context) -> Holding:
        held = await asyncio.get_running_loop().run_in_executor(self._threads, self._find, model_id)
        if held is None:
            await _refuse(context, grpc.StatusCode.NOT_FOUND, f"nothing of model {model_id[:12]!r} is here")
        return held


def pack_bits(flags: list[bool]) -> bytes:
    """One bit each, the lowest bit of a byte first."""
    packed = bytearray((len(flags) + 7) // 8)
    for index, flag in enumerate(flags):
        packed[index // 8] |= flag << index % 8
    return bytes(packed)


def unpack_bits(packed: bytes, count: int) -> list[bool] | None:
    """`count` flags; None when `packed` does not hold exactly so many."""
    if len(packed) != (count + 7) // 8:
        return None
    return [bool(packed[index // 8] >> index % 8 & 1) for index in range(count)]


def _read(path: Path, offset: int, count: int) -> bytes:
    # Opened for each piece: a transfer cancelled at any moment leaves nothing open.
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), count, offset)
    if not data:
        raise OSError("the file became shorter after the model was started")
    return data


async def _refuse(context: _Context, code: grpc.StatusCode, reason: str) -> NoReturn:
    await context.abort(code, reason)
    raise AssertionError("abort always raises")
