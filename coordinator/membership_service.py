"""The coordinator's gRPC surface: nodes that announce themselves."""

from __future__ import annotations

import re
from collections.abc import Callable

import grpc.aio

from cluster.addresses import split_host_port
from cluster.errors import UsageError
from cluster.identity import FINGERPRINT_CHARS
from cluster.interfaces import host_port
from cluster.types import NodeId
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc

_NODE_ID = re.compile(rf"[0-9a-f]{{{FINGERPRINT_CHARS}}}")


class CoordinatorService(rpc.CoordinatorServicer):
    """Called by nodes."""

    def __init__(self, cluster: str, announced: Callable[[str, NodeId], None]) -> None:
        self._cluster = cluster
        self._announced = announced

    async def Announce(
        self,
        request: pb.AnnounceRequest,
        context: grpc.aio.ServicerContext[pb.AnnounceRequest, pb.AnnounceReply],
    ) -> pb.AnnounceReply:
        """A node says where it listens. A hint like any other: the coordinator dials back and asks."""
        if request.cluster != self._cluster:
            reason = f"this coordinator serves cluster {self._cluster!r}, not {request.cluster!r}"
            return pb.AnnounceReply(accepted=False, reason=reason)
        host = request.host or _caller_host(context.peer())
        if host is None or not 0 < request.port < 65536:
            return pb.AnnounceReply(accepted=False, reason="an announcement needs the port that the node listens on")
        if _NODE_ID.fullmatch(request.node_id) is None:
            # Nothing could be checked against what the node says of itself when it is dialled.
            reason = (
                f"an announcement needs the node's id, {FINGERPRINT_CHARS} hex digits; found {request.node_id[:80]!a}. "
                "Install the same potluck version on both machines"
            )
            return pb.AnnounceReply(accepted=False, reason=reason)
        self._announced(host_port(host, request.port), NodeId(request.node_id))
        return pb.AnnounceReply(accepted=True)


def _caller_host(peer: str) -> str | None:
    """gRPC names its caller `ipv4:10.0.0.5:51234` or `ipv6:%5Bfd00::5%5D:51234`."""
    _, _, address = peer.partition(":")
    try:
        return split_host_port(address.replace("%5B", "[").replace("%5D", "]").replace("%25", "%"))[0]
    except UsageError:
        return None
