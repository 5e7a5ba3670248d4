"""Who may command this node. A pure rule over (holder, last heard, now)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.errors import NodeRefused
from cluster.limits import LEASE_TTL_S
from cluster.types import CoordinatorId

_ID = re.compile(r"[0-9a-f]{32}")
"""It is shown on screens, so nothing else passes for one."""

_SHOWN_CHARS = 12


def shown(coordinator: str) -> str:
    """As much of a coordinator's id as others may see: the whole of it commands the nodes that it holds."""
    return coordinator[:_SHOWN_CHARS]


@dataclass(frozen=True, slots=True)
class Lease:
    """At most one coordinator holds a node; it keeps it while it is heard from."""

    holder: CoordinatorId | None = None
    heard_s: float = 0.0

    def holder_at(self, now_s: float) -> CoordinatorId | None:
        """The coordinator that holds the node now, if any."""
        return self.holder if self.holder and now_s - self.heard_s < LEASE_TTL_S else None

    def granted(self, to: CoordinatorId, now_s: float) -> Lease:
        """The lease after `to` has asked for it or renewed it; NodeRefused while another holds it."""
        if not _ID.fullmatch(to):
            raise NodeRefused("expected a coordinator's id, 32 hex digits; found something else")
        current = self.holder_at(now_s)
        if current is not None and current != to:
            raise NodeRefused(
                f"this node serves coordinator {shown(current)}, as its own screen says; stop that one, or wait "
                f"{LEASE_TTL_S:.0f} s after it ends"
            )
        return Lease(to, now_s)

    def required(self, by: CoordinatorId, now_s: float) -> Lease:
        """The lease renewed by its holder; NodeRefused for anyone who does not hold it."""
        if self.holder_at(now_s) != by:
            raise NodeRefused("this coordinator does not hold the node's lease; take it first")
        return Lease(by, now_s)

    def released(self, by: CoordinatorId) -> Lease:
        return Lease() if self.holder == by else self
