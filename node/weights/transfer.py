"""Moves tensors from several sources at once into a store. Which source gets what is `node.weights.suppliers`.

A source that fails is left out and its runs go to others, from the byte where they stood. What arrives wrong is
fetched again, from another source where it came from a node. Owns tasks and measuring; knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

from cluster.errors import NodeLost, PotluckError
from cluster.models.manifest import TensorRecord
from cluster.quantities import format_bytes
from node.weights.journal import Mark
from node.weights.meter import Meter
from node.weights.ranges import Run
from node.weights.source import Source, SourceFailed
from node.weights.store import Store
from node.weights.suppliers import Supplier, choose, split, taken_back
from node.weights.writer import RunWriter

_log = logging.getLogger(__name__)

_TICK_S = 0.25
_ATTEMPTS_MAX = 2
"""At the coordinator, for a tensor that arrived wrong: the first fault may have been on the way."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class InThread(Protocol):
    async def __call__(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T: ...


@dataclass(slots=True, eq=False)
class _Job:
    source: Source
    supplier: Supplier
    run: Run
    began_s: float
    came_bytes: int = 0

    def came(self, count: int) -> None:
        self.came_bytes += count
        self.supplier.left_bytes -= count

    def over(self) -> None:
        """However it ended, nothing more comes of it."""
        self.supplier.in_flight -= 1
        self.supplier.left_bytes -= self.run.size_bytes - self.came_bytes


class Transfer:
    """One transfer of one slice. `fetch` may be called once."""

    def __init__(
        self,
        store: Store,
        sources: Sequence[tuple[Source, Supplier]],
        meter: Meter,
        in_thread: InThread,
        arrived: Callable[[Iterable[str]], None],
    ) -> None:
        self._store = store
        self._sources = {supplier: source for source, supplier in sources}
        self._suppliers = tuple(self._sources)
        self._meter = meter
        self._in_thread = in_thread
        self._arrived = arrived
        self._pending: list[Run] = []
        self._running: dict[asyncio.Task[list[TensorRecord]], _Job] = {}
        self._attempts: Counter[str] = Counter()
        self._hopeless: list[TensorRecord] = []
        self._error: PotluckError = NodeLost("no source of weights is left")
        self._counted = dict.fromkeys(self._suppliers, 0)

    async def fetch(self, tensors: Iterable[TensorRecord]) -> list[TensorRecord]:
        """Bring `tensors` here; returns those that the coordinator itself delivered wrong."""
        self._plan(tensors)
        clock = asyncio.get_running_loop().time
        measured_s = clock()
        try:
            while self._pending or self._running:
                self._give_out()
                if not self._running:
                    raise self._error
                done, _ = await asyncio.wait(self._running, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    job = self._running.pop(task, None)
                    if job is not None:  # else discarded with the others of a source that one of `done` convicted
                        await self._finish(task, job)
                if clock() - measured_s >= _TICK_S:
                    self._measure(clock() - measured_s)
                    measured_s = clock()
                await self._take_back()
        finally:
            await self._end(tuple(self._running))
        for supplier, source in self._sources.items():
            rate = f"{format_bytes(supplier.rate_bytes_s or 0)}/s lately"
            _log.info("%s of weights came from %s, %s", format_bytes(source.received_bytes), source.name, rate)
        return self._hopeless

    def _plan(self, tensors: Iterable[TensorRecord]) -> None:
        missing = [tensor for tensor in tensors if not self._store.is_verified(tensor)]
        received_bytes = {tensor.name: self._store.received_bytes(tensor) for tensor in missing}
        self._pending += split(missing, received_bytes, self._suppliers)

    def _give_out(self) -> None:
        while (chosen := choose(self._suppliers, self._pending)) is not None:
            supplier, run = chosen
            self._pending.remove(run)
            source = self._sources[supplier]
            supplier.in_flight += 1
            supplier.left_bytes += run.size_bytes
            job = _Job(source, supplier, run, asyncio.get_running_loop().time())
            self._running[asyncio.create_task(self._get_run(job))] = job

    async def _finish(self, task: asyncio.Task[list[TensorRecord]], job: _Job) -> None:
        job.over()
        try:
            bad = task.result()
        except asyncio.CancelledError:
            self._plan(job.run.tensors)  # taken back
        except SourceFailed as failure:
            _log.warning("%s is left out: %s", job.source.name, failure.error)
            self._error = failure.error
            job.supplier.left_out = True
            self._plan(job.run.tensors)
        else:
            if job.supplier.rate_bytes_s is None:
                job.supplier.measured(job.run.size_bytes, asyncio.get_running_loop().time() - job.began_s)
            for tensor in bad:
                await self._arrived_wrong(tensor, job)

    async def _arrived_wrong(self, tensor: TensorRecord, job: _Job) -> None:
        resumed = job.run.skip_bytes > 0 and tensor is job.run.tensors[0]
        if job.supplier.is_coordinator:
            self._attempts[tensor.name] += 1
        elif not resumed and not job.supplier.left_out:
            # Its other runs are no better. A tensor that two sources delivered is nobody's fault in particular.
            _log.warning("%s is left out: its %s is not the model's", job.source.name, tensor.name)
            job.supplier.left_out = True
            await self._discard(job.supplier)
        if self._attempts[tensor.name] < _ATTEMPTS_MAX:
            self._plan([tensor])
        else:
            self._hopeless.append(tensor)

    async def _discard(self, supplier: Supplier) -> None:
        """Stop what `supplier` still sends, and forget the unchecked part of it."""
        tasks = [task for task, job in self._running.items() if job.supplier is supplier]
        await self._end(tasks)
        for task in tasks:
            job = self._running.pop(task)
            job.over()
            partial = [tensor for tensor in job.run.tensors if not self._store.is_verified(tensor)]
            marks = [Mark(tensor.name, 0, verified=False) for tensor in partial]
            await self._in_thread(self._store.journal.append, marks)
            self._plan(partial)

    def _measure(self, seconds: float) -> None:
        for supplier, source in self._sources.items():
            count = source.received_bytes - self._counted[supplier]
            self._counted[supplier] = source.received_bytes
            if any(job.supplier is supplier and job.began_s + seconds <= _now() for job in self._running.values()):
                supplier.measured(count, seconds)

    async def _take_back(self) -> None:
        if self._pending:
            return
        run = taken_back(self._suppliers, ((job.supplier, job.run) for job in self._running.values()))
        if run is not None:
            await self._end([task for task, job in self._running.items() if job.run is run])

    async def _end(self, tasks: Sequence[asyncio.Task[list[TensorRecord]]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _get_run(self, job: _Job) -> list[TensorRecord]:
        run = job.run
        writer = await self._in_thread(RunWriter, self._store, run)
        counted = 0
        try:
            await self._in_thread(writer.resume)
            counted += self._count(run.skip_bytes)
            async with contextlib.aclosing(job.source.read(run.file, run.begin, run.end)) as pieces:
                async for piece in pieces:
                    job.came(len(piece))
                    await self._in_thread(writer.write, piece)
                    counted += self._count(len(piece))
        finally:
            # Broken off or not: tensors that arrived well need not come again.
            try:
                await self._in_thread(writer.finish)
            finally:
                writer.close()
                good = [tensor for tensor in run.tensors if self._store.is_verified(tensor)]
                self._arrived(tensor.name for tensor in good)
                self._count(sum(tensor.size_bytes for tensor in good) - counted)  # the rest when it comes again
        return writer.bad

    def _count(self, count: int) -> int:
        self._meter.add_done(count)
        return count


def _now() -> float:
    return asyncio.get_running_loop().time()
