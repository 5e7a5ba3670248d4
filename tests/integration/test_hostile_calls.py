"""Control calls to a node by those who may not command it: they are refused, everything else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio
import pytest

pytest.importorskip("torch", reason="the checkpoint is made with transformers: the extra [torch]")

from cluster.transport import Credentials
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc
from tests.integration.hostile import WAIT_S, Stage
from tests.integration.live import Coordinator, happenings

pytestmark = pytest.mark.usefixtures("unharmed")


def _refusal(address: str, call: Callable[[rpc.NodeAsyncStub], object]) -> grpc.aio.AioRpcError:
    """How the node at `address` refuses a call."""

    async def ask() -> None:
        async with Credentials().channel(address) as channel:
            answer = call(rpc.NodeStub(channel))
            if hasattr(answer, "__aiter__"):
                async for _ in answer:
                    pass
            await answer  # type: ignore[misc]

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(ask())
    return caught.value


def test_whoever_does_not_hold_the_lease_is_refused_every_change(stages: list[Stage]) -> None:
    stranger = "f" * 32
    calls: list[Callable[[rpc.NodeAsyncStub], object]] = [
        lambda node: node.Release(pb.ReleaseRequest(coordinator_id=stranger), timeout=WAIT_S),
        lambda node: node.Load(pb.LoadRequest(coordinator_id=stranger), timeout=WAIT_S),
        lambda node: node.Connect(pb.ConnectRequest(coordinator_id=stranger), timeout=WAIT_S),
        lambda node: node.Watch(pb.WatchRequest(coordinator_id=stranger), timeout=WAIT_S),
    ]
    for call in calls:
        refusal = _refusal(stages[0].address, call)
        assert refusal.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "lease" in (refusal.details() or "")


def test_what_a_node_tells_anyone_does_not_let_them_command_it(mixed: Coordinator, stages: list[Stage]) -> None:
    """Holding the lease is proved by the coordinator's id, so nobody learns the whole of it."""

    async def told() -> str:
        async with Credentials().channel(stages[0].address) as channel:
            stub: rpc.NodeAsyncStub = rpc.NodeStub(channel)
            return (await stub.Describe(pb.DescribeRequest(), timeout=WAIT_S)).leased_to

    seen = asyncio.run(told())
    assert seen and happenings(mixed.process, "listening")[0]["coordinator"].startswith(seen)
    release = pb.ReleaseRequest(coordinator_id=seen)
    refusal = _refusal(stages[0].address, lambda node: node.Release(release, timeout=WAIT_S))
    assert refusal.code() is grpc.StatusCode.FAILED_PRECONDITION
