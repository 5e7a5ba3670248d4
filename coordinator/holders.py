"""Who holds the served model's weights, and who is sending them: asked of every node now and then, for the status.

Nodes decide among themselves who sends what; this only watches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.errors import PotluckError
from cluster.models.manifest import Manifest
from cluster.types import NodeId
from cluster.weight_service import unpack_bits
from coordinator.node_client import NodeClient
from coordinator.roster import Roster

_MOVING_INTERVAL_S, _STILL_INTERVAL_S = 2.0, 10.0
"""Often enough to follow a transfer; and seldom while nothing moves, since a node looks up every tensor to answer."""


@dataclass(frozen=True, slots=True)
class Held:
    """What lies on a node's disk, and what it lately sent to others."""

    held_bytes: int
    sent_bytes: int
    sending_bytes_s: float
    asked_s: float
    packed: bytes = b""  # the answer itself

    def then(self, packed: bytes, held_bytes: int, sent_bytes: int, now: float) -> Held:
        """The next answer. A node that has started anew counts from zero again."""
        grown_bytes = max(sent_bytes - self.sent_bytes, 0)
        return Held(held_bytes, sent_bytes, grown_bytes / max(now - self.asked_s, 1e-3), now, packed)


class Holders:
    """The latest answers, by node."""

    def __init__(self, manifest: Manifest, roster: Roster, now: Callable[[], float] = time.monotonic) -> None:
        self._manifest = manifest
        self._roster = roster
        self._now = now
        self._held: dict[NodeId, Held] = {}

    @property
    def held(self) -> Mapping[NodeId, Held]:
        return self._held

    async def watch(self) -> None:
        """Ask for ever."""
        while True:
            members = dict(self._roster.members)
            moved = await asyncio.gather(*(self._ask(node, member.client) for node, member in members.items()))
            self._held = {node: held for node, held in self._held.items() if node in self._roster.members}
            await asyncio.sleep(_MOVING_INTERVAL_S if not moved or any(moved) else _STILL_INTERVAL_S)

    async def _ask(self, node: NodeId, client: NodeClient) -> bool:
        """Whether anything has changed since the last time."""
        try:
            packed, sent_bytes = await client.holdings(self._manifest.id)
        except PotluckError:
            packed, sent_bytes = b"", 0  # it has nothing of this model, or it is gone, which others notice
        now = self._now()
        before = self._held.get(node) or Held(0, sent_bytes, 0.0, now)
        held_bytes = before.held_bytes if before.packed == packed else self._held_bytes(packed)
        self._held[node] = before.then(packed, held_bytes, sent_bytes, now)
        return (before.packed, before.sent_bytes) != (packed, sent_bytes)

    def _held_bytes(self, packed: bytes) -> int:
        tensors = self._manifest.tensors
        flags = unpack_bits(packed, len(tensors)) or [False] * len(tensors)
        return sum(tensor.size_bytes for tensor, here in zip(tensors, flags, strict=True) if here)
