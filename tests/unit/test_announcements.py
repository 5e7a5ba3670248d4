"""What a coordinator makes of announcements: hints from strangers, which it takes or refuses with a reason."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.wire.node_pb2 import AnnounceRequest
from coordinator.membership_service import CoordinatorService

_ID = "0123456789abcdef" * 2


def _announce(**fields: Any) -> tuple[bool, str, list[tuple[str, str]]]:
    """Whether it was taken, why not, and what was announced."""
    announced: list[tuple[str, str]] = []
    service = CoordinatorService("home", lambda address, node: announced.append((address, node)))
    request = AnnounceRequest(**{"cluster": "home", "port": 7441, "node_id": _ID} | fields)
    context: Any = SimpleNamespace(peer=lambda: "ipv4:10.0.0.5:51234")
    reply = asyncio.run(service.Announce(request, context))
    return reply.accepted, reply.reason, announced


def test_an_announcement_without_a_host_means_its_callers() -> None:
    assert _announce() == (True, "", [("10.0.0.5:7441", _ID)])


@pytest.mark.parametrize("node_id", ["", "short", _ID.upper(), _ID + "0", "../" * 10 + "ab"])
def test_an_announcement_without_a_nodes_id_is_refused_and_told_what_is_missing(node_id: str) -> None:
    accepted, reason, announced = _announce(node_id=node_id)
    assert (accepted, announced) == (False, [])
    assert "needs the node's id, 32 hex digits" in reason
    assert ascii(node_id) in reason


@pytest.mark.parametrize(
    ("fields", "words"), [({"cluster": "lab"}, "serves cluster 'home'"), ({"port": 0}, "needs the port")]
)
def test_an_announcement_to_nobody_here_is_refused(fields: dict[str, Any], words: str) -> None:
    accepted, reason, announced = _announce(**fields)
    assert (accepted, announced) == (False, [])
    assert words in reason
