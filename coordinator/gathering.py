"""When to plan, and when to wait for more nodes. A pure rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import DoesNotFit
from cluster.models.facts import ModelFacts
from cluster.nodes import NodeFacts
from cluster.placement import Ask, place
from cluster.plan import Plan

SETTLE_S = 2.0
"""Nodes that were started together appear within this time (mDNS: 0.05 to 1.2 s measured), so a plan made
after it need not be thrown away at once."""


RECHECK_S = 2.0
"""After a refusal: memory that somebody frees shows in the next heartbeats, and no other event tells of it."""

RETRY_S, RETRY_MAX_S = 0.5, 30.0
"""Between a broken plan and the next one of the same nodes: long enough that a node which is dying is noticed
first; and what fails at once, again and again, must not make the coordinator spin."""

STEADY_S = 30.0
"""A plan that served so long worked; what broke it was an event and no fault of the plan."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A plan that broke. `failures` counts it and those before it that are held against the next one."""

    served: bool  # it had brought a token
    failures: int = 0

    def next(self, served_s: float | None) -> Broken:
        """The plan after this one broke as well; it had served for `served_s`, None when it never did. One that
        worked, or that was the first to serve after others, is held against nobody."""
        forgiven = served_s is not None and (served_s > STEADY_S or not self.served)
        return Broken(served_s is not None, 0 if forgiven else self.failures + 1)

    @property
    def pause_s(self) -> float:
        """How long the next plan of the same nodes waits."""
        return min(RETRY_S * (1 << min(self.failures, 16)), RETRY_MAX_S)


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet; `reason` is for people, `again_s` is when to ask again even if nothing happens."""

    reason: str
    again_s: float | None


def decide(facts: ModelFacts, nodes: Sequence[NodeFacts], ask: Ask, *, min_nodes: int, quiet_s: float) -> Plan | Wait:
    """Plan with `nodes` now, or say what is missing. `quiet_s` is how long ago the set last changed."""
    if len(nodes) < max(1, min_nodes):
        missing = max(1, min_nodes) - len(nodes)
        them = "one more node" if missing == 1 else f"{missing} more nodes"
        return Wait(f"waiting for {them} ({len(nodes)} of {max(1, min_nodes)} here)", None)
    settling_s = SETTLE_S - quiet_s
    if settling_s > 0 and len(nodes) != min_nodes:
        return Wait("waiting a moment for further nodes", settling_s)
    try:
        return place(facts, nodes, ask)
    except DoesNotFit as refusal:
        return Wait(str(refusal), RECHECK_S)
