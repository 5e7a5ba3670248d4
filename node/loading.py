"""Brings a stage to life on this node: its weights to disk, its slice into an engine, a flow around it.

Owns the one engine thread of the process. Knows nothing of leases or protobuf.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster.codec import Expectation
from cluster.errors import ClusterError, PotluckError
from cluster.nodes import LoadPhase, LoadReport
from cluster.plan import Assignment
from cluster.transport import Credentials
from cluster.types import Backend
from node.engine import Engine, LoadProgress, StageSpec
from node.engines.registry import create_engine
from node.flow import StageFlow
from node.stage import StageRunner
from node.weights.arrival import Arrival
from node.weights.fetch import SliceRequest, ensure_slice
from node.weights.meter import FetchProgress
from node.weights.shelf import Shelf

Report = Callable[[LoadReport], None]


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What this node computes with."""

    backend: Backend
    device: str
    threads: int | None


class StageLoader:
    """Loads stages, one at a time."""

    def __init__(self, choice: EngineChoice, shelf: Shelf, credentials: Credentials) -> None:
        self._choice = choice
        self._shelf = shelf
        self._credentials = credentials
        # One thread for the life of the process: MLX's streams belong to the thread that made them.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def prepare(self) -> None:
        """Import the engine now. It takes seconds in which this process answers slowly, so it is done before
        anyone counts on the node's heartbeat."""
        await asyncio.get_running_loop().run_in_executor(self._thread, create_engine, self._choice.backend)

    async def load(self, assignment: Assignment, report: Report) -> StageFlow:
        """Fetch and load one stage, both at once. Whatever goes wrong is a PotluckError, and leaves nothing loaded."""
        arrival = Arrival()
        fetching = asyncio.create_task(self._fetch(assignment, report, arrival))
        try:
            engine = await self._load(assignment, report, arrival)
            try:
                await fetching
            except BaseException:
                # The disk may be full, or the load cancelled, when the engine has all that it reads.
                self._thread.submit(engine.close)
                raise
        except BaseException:
            fetching.cancel()  # ends the engine's waiting, too
            await asyncio.gather(fetching, return_exceptions=True)
            raise
        return self._flow(engine, assignment)

    async def _load(self, assignment: Assignment, report: Report, arrival: Arrival) -> Engine:
        """The engine with its slice, of which the engine reads what has arrived."""
        spec = self._spec(await arrival.folder(), assignment, arrival)
        loop = asyncio.get_running_loop()
        engine = await loop.run_in_executor(self._thread, create_engine, self._choice.backend)
        reporter = self._reporter(loop, report, arrival)
        try:
            await loop.run_in_executor(self._thread, engine.load, spec, reporter)
            arrival.check_awaited()
        except BaseException as error:
            # Cancelled or failed: the engine thread frees what it holds once it is done with the load.
            self._thread.submit(engine.close)
            if isinstance(error, PotluckError) or not isinstance(error, Exception):
                raise
            # Whatever a library raises while it loads (out of memory, a broken driver) is this load's failure.
            _log.exception("the engine could not load its slice")
            raise ClusterError(f"the engine could not load its slice: {type(error).__name__}: {error}") from error
        return engine

    async def _fetch(self, assignment: Assignment, report: Report, arrival: Arrival) -> None:
        """Have the slice's weights on the disk, or have `arrival` know why they are not."""
        request = SliceRequest(
            model=assignment.model,
            layers=assignment.layers,
            layer_count=assignment.layer_count,
            local_folder=Path(assignment.local_folder) if assignment.local_folder else None,
        )

        def on_progress(fetched: FetchProgress) -> None:
            report(
                LoadReport(
                    LoadPhase.FETCHING,
                    fetched.done_bytes,
                    fetched.total_bytes,
                    fetched.received_bytes,
                    fetched.rate_bytes_s,
                )
            )

        channel = self._credentials.channel(assignment.weights_address)
        peers = {address: self._credentials.channel(address) for address in assignment.peer_addresses}
        try:
            arrival.end(
                await ensure_slice(
                    request, shelf=self._shelf, channel=channel, peers=peers, progress=on_progress, arrival=arrival
                )
            )
        except BaseException as error:
            arrival.fail(error)
            raise
        finally:
            await asyncio.gather(channel.close(), *(peer.close() for peer in peers.values()))

    def _spec(self, folder: Path, assignment: Assignment, arrival: Arrival) -> StageSpec:
        return StageSpec(
            folder=folder,
            layers=assignment.layers,
            layer_count=assignment.layer_count,
            boundary=assignment.boundary,
            device=self._choice.device,
            threads=self._choice.threads,
            kv_tokens=assignment.kv_tokens,
            context_tokens=assignment.context_tokens,
            bits=assignment.bits,
            await_tensors=arrival.wait_for,
        )

    def _reporter(
        self, loop: asyncio.AbstractEventLoop, report: Report, arrival: Arrival
    ) -> Callable[[LoadProgress], None]:
        began = time.monotonic()

        def tell(loading: LoadReport) -> None:
            if arrival.complete:  # until then the fetch says how far it is, and the engine is no further
                report(loading)

        def on_progress(progress: LoadProgress) -> None:
            elapsed_s = max(time.monotonic() - began, 1e-3)
            loading = LoadReport(
                LoadPhase.LOADING,
                progress.done_bytes,
                progress.total_bytes,
                rate_bytes_s=progress.done_bytes / elapsed_s,
            )
            loop.call_soon_threadsafe(tell, loading)

        return on_progress

    def _flow(self, engine: Engine, assignment: Assignment) -> StageFlow:
        return StageFlow(
            StageRunner(engine, stage=assignment.stage, is_last=assignment.is_last),
            Expectation(
                assignment.fence,
                boundary=() if assignment.is_first else assignment.boundary,
                vocab_size=assignment.vocab_size,
            ),
            stage=assignment.stage,
            is_last=assignment.is_last,
            engine_thread=self._thread,
        )

    async def settle(self) -> None:
        """Wait until the engine thread has done what it was given, however long that takes."""
        await asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
