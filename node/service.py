"""The node's gRPC surface: control calls, and the data streams that feed its stage.

Translates between protobuf and our values, and owns the node's two pieces of state: who holds the lease, and
which stage is installed. How a stage runs is `node.flow`; how it gets its weights is `node.weights`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Final, NoReturn

import grpc.aio

from cluster import messages
from cluster.errors import ClusterError, NodeRefused, PotluckError, WireError
from cluster.frames import StreamRole
from cluster.handshake import answer_greeting
from cluster.limits import HEARTBEAT_INTERVAL_S, PROTOCOL_VERSION
from cluster.nodes import Heartbeat, LoadPhase, LoadReport, MemoryReport, NodeFacts, NodePhase
from cluster.plan import Assignment, Fence
from cluster.status import code_of
from cluster.transport import ByteStream, Credentials
from cluster.types import CoordinatorId
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc
from node.flow import StageFlow
from node.happenings import AtWork, Failed, Free, Preparing, Taken, TellNode
from node.lease import Lease, shown
from node.loading import StageLoader

_log = logging.getLogger(__name__)

_LEASE_CHECK_S: Final = 2.0

_REPORT_INTERVAL_S: Final = 0.1
"""How often a load says how far it is: smooth for a progress bar, nothing for the network."""


@dataclass(frozen=True, slots=True)
class NodeSetup:
    """What this process is and may use; the service itself measures nothing."""

    facts: NodeFacts
    measure: Callable[[], MemoryReport]
    credentials: Credentials


class NodeService(rpc.NodeServicer):
    """One node: at most one coordinator, at most one stage."""

    def __init__(
        self,
        setup: NodeSetup,
        loader: StageLoader,
        now: Callable[[], float] = time.monotonic,
        tell: TellNode = lambda _: None,
    ) -> None:
        self._setup = setup
        self._loader = loader
        self._tell = tell
        self._now = now
        self._lease = Lease()
        self._flow: StageFlow | None = None
        self._phase = NodePhase.IDLE
        self._changing = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._unloading: asyncio.Task[None] | None = None

    # -- Control -----------------------------------------------------------------------------------------

    async def Describe(self, request: pb.DescribeRequest, context: _Context) -> pb.NodeDescription:
        facts = replace(self._setup.facts, memory=self._setup.measure())
        return messages.description_out(facts, shown(self._lease.holder_at(self._now()) or ""))

    async def Lease(self, request: pb.LeaseRequest, context: _Context) -> pb.LeaseReply:
        facts = self._setup.facts
        try:
            if request.cluster != facts.cluster:
                raise NodeRefused(f"this node belongs to cluster {facts.cluster!r}, not {request.cluster!r}")
            if request.protocol != PROTOCOL_VERSION:
                raise NodeRefused(
                    f"this node speaks protocol {PROTOCOL_VERSION}, the coordinator {request.protocol}; "
                    "install the same potluck version on both"
                )
            coordinator = CoordinatorId(request.coordinator_id)
            previous = self._lease.holder
            self._lease = self._lease.granted(coordinator, self._now())
        except NodeRefused as refusal:
            return pb.LeaseReply(granted=False, reason=str(refusal))
        if previous not in (None, coordinator):
            await self._unload()  # what an expired coordinator left behind
        if previous != coordinator:
            self._tell(Taken(shown(coordinator)))
        return pb.LeaseReply(granted=True)

    async def Release(self, request: pb.ReleaseRequest, context: _Context) -> pb.ReleaseReply:
        await self._require(request.coordinator_id, context)
        self._lease = self._lease.released(CoordinatorId(request.coordinator_id))
        await self._unload()
        self._tell(Free("its coordinator gave it back"))
        return pb.ReleaseReply()

    async def Unload(self, request: pb.UnloadRequest, context: _Context) -> pb.UnloadReply:
        await self._require(request.coordinator_id, context)
        await self._unload()
        return pb.UnloadReply()

    async def Load(self, request: pb.LoadRequest, context: _Context) -> AsyncIterator[pb.LoadProgress]:
        await self._require(request.coordinator_id, context)
        await self._unload()
        async with self._changing:
            self._phase = NodePhase.LOADING
            began_s = self._now()
            try:
                assignment = messages.assignment_in(request)
                self._tell(Preparing(assignment.layers, assignment.layer_count))
                # Closed at once when the caller goes away, so that the load is cancelled then and not some time later.
                async with contextlib.aclosing(self._loading(assignment)) as loading:
                    async for progress in loading:
                        self._lease = self._lease.required(CoordinatorId(request.coordinator_id), self._now())
                        yield progress
            except PotluckError as error:
                self._tell(Failed(str(error)))
                await _abort(context, error)
            finally:
                self._phase = NodePhase.READY if self._flow else NodePhase.IDLE
        self._tell(AtWork(assignment.layers, assignment.layer_count, self._now() - began_s))
        yield pb.LoadProgress(phase=pb.LoadProgress.READY)

    async def _loading(self, assignment: Assignment) -> AsyncGenerator[pb.LoadProgress, None]:
        """Run the load as a task and yield its progress; installs the flow at the end."""
        news: asyncio.Queue[LoadReport] = asyncio.Queue()
        task = asyncio.create_task(self._loader.load(assignment, news.put_nowait))
        latest = LoadReport(LoadPhase.FETCHING)
        try:
            while not task.done():
                # Beats even when there is no news, so that the lease is renewed and a dead caller is noticed.
                await asyncio.wait((task,), timeout=_REPORT_INTERVAL_S)
                while not news.empty():
                    before, latest = latest, news.get_nowait()
                    if latest.phase is not before.phase:
                        yield messages.report_out(before)  # a phase's last word: all that was received
                yield messages.report_out(latest)
            self._flow = await task
        finally:
            if not task.cancel() and self._flow is None:
                await self._close_unclaimed(task)

    async def Connect(self, request: pb.ConnectRequest, context: _Context) -> pb.ConnectReply:
        await self._require(request.coordinator_id, context)
        try:
            async with self._changing:  # so that the stage is not unloaded meanwhile
                flow = self._installed(messages.fence_in(request.fence))
                if request.next_address:
                    await flow.connect_next(self._setup.credentials, request.next_address)
        except PotluckError as error:
            await _abort(context, error)
        return pb.ConnectReply()

    async def Watch(self, request: pb.WatchRequest, context: _Context) -> AsyncIterator[pb.Heartbeat]:
        await self._require(request.coordinator_id, context)
        while True:
            # The stream itself proves that the coordinator is there: gRPC ends it when pings go unanswered.
            await self._require(request.coordinator_id, context)
            yield messages.heartbeat_out(self._heartbeat())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                    await self._stopping.wait()
                    return

    def _heartbeat(self) -> Heartbeat:
        flow = self._flow
        return Heartbeat(
            fence=flow.fence if flow else None,
            phase=self._phase,
            steps_done=flow.steps_done if flow else 0,
            steps_queued=flow.steps_queued if flow else 0,
            memory=self._setup.measure(),
            kv_tokens_used=flow.capacity.kv_tokens_used if flow else 0,
            sequences=flow.capacity.sequences if flow else 0,
            problem=flow.problem if flow else "",
            narrow_error=flow.narrow_error if flow else None,
        )

    # -- Data --------------------------------------------------------------------------------------------

    async def serve_stream(self, stream: ByteStream) -> None:
        """One data stream, opened by the stage before this one or by the coordinator."""
        try:
            flow = self._flow
            if flow is None:
                raise WireError("no stage is installed here")
            hello = await answer_greeting(stream, flow.fence, flow.stage)
            match hello.role:
                case StreamRole.UPSTREAM:
                    await flow.receive(stream)
                case StreamRole.RESULTS:
                    await flow.deliver(stream)
        except (WireError, ClusterError) as error:
            # Bytes that break the contract end their own stream; everyone else goes on. If they came from the stage
            # before this one, that one notices the end and says so in its heartbeat.
            _log.warning("a data stream was closed: %s", error)

    # -- State -------------------------------------------------------------------------------------------

    async def _require(self, coordinator_id: str, context: _Context) -> None:
        try:
            self._lease = self._lease.required(CoordinatorId(coordinator_id), self._now())
        except NodeRefused as refusal:
            await _abort(context, refusal)

    def _installed(self, fence: Fence) -> StageFlow:
        if self._flow is None or self._flow.fence != fence:
            raise NodeRefused(f"no stage of {fence} is installed on this node")
        return self._flow

    async def _unload(self) -> None:
        """Free the stage. A caller that gives up waiting does not stop that; the next one waits for it."""
        if self._unloading is None or self._unloading.done():
            self._unloading = asyncio.create_task(self._free())
        await asyncio.shield(self._unloading)

    async def _free(self) -> None:
        async with self._changing:
            flow, self._flow = self._flow, None
            self._phase = NodePhase.IDLE
            if flow is not None:
                await flow.close()

    @staticmethod
    async def _close_unclaimed(task: asyncio.Task[StageFlow]) -> None:
        """The load had ended when its caller went away: nobody will ever use what it made."""
        if not task.cancelled() and task.exception() is None:
            await task.result().close()

    def begin_to_stop(self) -> None:
        """End the heartbeats, so that the coordinator learns at once, before the server cancels what still runs."""
        self._stopping.set()

    async def mind_lease(self) -> None:
        """Free what a coordinator left behind that was not heard from for the length of a lease."""
        while True:
            await asyncio.sleep(_LEASE_CHECK_S)
            if self._lease.holder is not None and self._lease.holder_at(self._now()) is None:
                self._lease = Lease()
                await self._unload()
                self._tell(Free("its coordinator has not been heard from"))

    async def close(self) -> None:
        """Free everything; called once at the end of the process."""
        with contextlib.suppress(asyncio.CancelledError):
            await self._unload()


_Context = grpc.aio.ServicerContext[object, object]


async def _abort(context: _Context, error: PotluckError) -> NoReturn:
    """Answer with the error's kind and message; the caller's side raises the same error."""
    await context.abort(code_of(error), str(error))
