"""Tells a coordinator that mDNS does not reach where this node listens, again and again, so that a coordinator
that starts later, or starts anew, finds it too."""

from __future__ import annotations

import asyncio
import logging

import grpc.aio

from cluster.addresses import is_loopback, split_host_port
from cluster.limits import CONTROL_TIMEOUT_S
from cluster.nodes import NodeFacts
from cluster.transport import Credentials
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc

_log = logging.getLogger(__name__)

_INTERVAL_S = 5.0
"""A coordinator that was restarted waits no longer than this for its static nodes."""


async def announce_forever(credentials: Credentials, coordinator: str, facts: NodeFacts, port: int, host: str) -> None:
    """Announce this node to `coordinator` until cancelled. Says once when that stops or starts to work."""
    last = None
    interval_s = 0.2
    async with credentials.channel(coordinator) as channel:
        stub: rpc.CoordinatorAsyncStub = rpc.CoordinatorStub(channel)
        request = pb.AnnounceRequest(
            cluster=facts.cluster, port=port, host=_reachable(host, coordinator), node_id=facts.id
        )
        while True:
            outcome = await _announce(stub, request)
            if outcome != last:
                level = logging.WARNING if outcome else logging.INFO
                _log.log(level, "coordinator %s: %s", coordinator, outcome or "knows this node now")
                last = outcome
            # Quick at first: a coordinator that is just starting up needs a moment.
            interval_s = _INTERVAL_S if not outcome else min(_INTERVAL_S, interval_s * 2)
            await asyncio.sleep(interval_s)


async def _announce(stub: rpc.CoordinatorAsyncStub, request: pb.AnnounceRequest) -> str:
    """Empty when the coordinator took the announcement, else why not."""
    try:
        reply = await stub.Announce(request, timeout=CONTROL_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return f"not reached yet: {error.details() or error.code().name}"
    return "" if reply.accepted else reply.reason


def _reachable(host: str, coordinator: str) -> str:
    """The host to announce: empty lets the coordinator use the address that the call comes from."""
    if not host or host in ("0.0.0.0", "::"):
        return ""
    if is_loopback(host) and not is_loopback(split_host_port(coordinator)[0]):
        return ""
    return host
