"""One node, as the coordinator calls it: control messages out, values and typed errors back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

from cluster import messages
from cluster.errors import NodeLost, NodeRefused
from cluster.limits import CONTROL_TIMEOUT_S, LOAD_STALL_TIMEOUT_S, PROTOCOL_VERSION
from cluster.nodes import Heartbeat, LoadPhase, LoadReport, NodeFacts
from cluster.plan import Assignment, Fence
from cluster.status import rpc_errors
from cluster.transport import Credentials
from cluster.types import CoordinatorId, ModelId
from cluster.waiting import each_within
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc


class NodeClient:
    """A channel to one node. Every call has a deadline."""

    def __init__(
        self,
        credentials: Credentials,
        address: str,
        coordinator: CoordinatorId,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self._now = now
        self._coordinator = coordinator
        self._channel = credentials.channel(address)
        self._stub: rpc.NodeAsyncStub = rpc.NodeStub(self._channel)
        self._weights: rpc.WeightsAsyncStub = rpc.WeightsStub(self._channel)

    @property
    def _who(self) -> str:
        return f"the node at {self.address}"

    async def describe(self) -> NodeFacts:
        with rpc_errors(self._who):
            answer = await self._stub.Describe(pb.DescribeRequest(), timeout=CONTROL_TIMEOUT_S)
        return messages.description_in(answer, self.address)

    async def lease(self, cluster: str) -> None:
        """Take the node; NodeRefused when another coordinator holds it or it belongs to another cluster."""
        request = pb.LeaseRequest(coordinator_id=self._coordinator, cluster=cluster, protocol=PROTOCOL_VERSION)
        with rpc_errors(self._who):
            reply = await self._stub.Lease(request, timeout=CONTROL_TIMEOUT_S)
        if not reply.granted:
            raise NodeRefused(reply.reason)

    async def release(self) -> None:
        """Give the node back. It would notice by itself; this is quicker."""
        with rpc_errors(self._who):
            await self._stub.Release(pb.ReleaseRequest(coordinator_id=self._coordinator), timeout=CONTROL_TIMEOUT_S)

    async def holdings(self, model: ModelId) -> tuple[bytes, int]:
        """Which of the model's tensors lie on the node's disk, as one bit each, and how many bytes of weights it has
        sent to others so far."""
        with rpc_errors(self._who):
            found = await self._weights.GetHoldings(pb.GetHoldingsRequest(model_id=model), timeout=CONTROL_TIMEOUT_S)
        return found.tensors, found.sent_bytes

    async def unload(self) -> None:
        """Free what the node has loaded, so that its memory counts for the next plan."""
        with rpc_errors(self._who):
            await self._stub.Unload(pb.UnloadRequest(coordinator_id=self._coordinator), timeout=CONTROL_TIMEOUT_S)

    async def load(self, assignment: Assignment) -> AsyncIterator[LoadReport]:
        """Load a stage; ends after the report that it is ready. Raises what the node raised."""
        with rpc_errors(self._who):
            call = self._stub.Load(messages.assignment_out(assignment, self._coordinator))
        latest, changed_s = LoadReport(LoadPhase.FETCHING), self._now()
        try:
            with rpc_errors(self._who):
                async for message in each_within(call, LOAD_STALL_TIMEOUT_S):
                    report = messages.report_in(message)
                    if report != latest:
                        latest, changed_s = report, self._now()
                        yield report
                    # The node repeats itself while nothing moves, so that it is known to live.
                    elif self._now() - changed_s > LOAD_STALL_TIMEOUT_S:
                        raise TimeoutError
        except TimeoutError as error:
            raise NodeLost(f"{self._who} has loaded nothing for {LOAD_STALL_TIMEOUT_S:.0f} s") from error
        finally:
            call.cancel()
        if latest.phase is not LoadPhase.READY:
            raise NodeLost(f"{self._who} ended its load without being ready")

    async def connect(self, fence: Fence, next_address: str) -> None:
        """Let the node dial the stage after it (none for the last)."""
        request = pb.ConnectRequest(
            coordinator_id=self._coordinator, fence=messages.fence_out(fence), next_address=next_address
        )
        with rpc_errors(self._who):
            await self._stub.Connect(request, timeout=2 * CONTROL_TIMEOUT_S)

    async def watch(self, silence_max_s: float) -> AsyncIterator[Heartbeat]:
        """Heartbeats until the node is lost, which raises NodeLost."""
        with rpc_errors(self._who):
            call = self._stub.Watch(pb.WatchRequest(coordinator_id=self._coordinator))
        try:
            with rpc_errors(self._who):
                async for message in each_within(call, silence_max_s):
                    yield messages.heartbeat_in(message)
        except TimeoutError as error:
            raise NodeLost(f"{self._who} was silent for {silence_max_s:.1f} s") from error
        finally:
            call.cancel()
        raise NodeLost(f"{self._who} ended its heartbeats")

    async def close(self) -> None:
        await self._channel.close()
