"""The nodes that may take part, in one order that does not depend on how they were listed.

Owns: whose memory is whose. Nodes of one host share its memory; where their budgets together exceed it, the
search has to watch the sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.models.facts import ModelFacts
from cluster.models.formats import HALF_EXPERTS
from cluster.nodes import NodeFacts
from cluster.types import Backend, HostId


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that can run the model."""

    node: NodeFacts
    budget_bytes: int  # its own budget, and never more than its host's
    shared_host: HostId | None  # set where the host's nodes together could exceed the host's budget

    @property
    def kind(self) -> tuple[Backend, int]:
        """Candidates of one kind can hold the same stages."""
        return self.node.backend, self.budget_bytes


@dataclass(frozen=True, slots=True)
class Pool:
    """The candidates, the largest budget first, and the budgets of shared hosts."""

    candidates: tuple[Candidate, ...]
    host_budgets: dict[HostId, int]

    @property
    def usable_bytes(self) -> int:
        """Memory of all candidates, no host's counted twice."""
        alone = sum(candidate.budget_bytes for candidate in self.candidates if candidate.shared_host is None)
        return alone + sum(self.host_budgets.values())

    def among(self, candidates: Iterable[Candidate]) -> Pool:
        """The pool of some of the candidates."""
        return pool_of([candidate.node for candidate in candidates])


def why_unable(facts: ModelFacts, node: NodeFacts) -> str | None:
    """Why the node's engine cannot run the model, whatever its memory; None when it can."""
    if node.backend not in facts.backends:
        return f"it runs {node.backend}, and this model runs on {' or '.join(sorted(facts.backends))} only"
    if unread := sorted(facts.formats - node.formats):
        remedy = "; --bits 8 would pack them" if unread == [HALF_EXPERTS] and facts.quantization is None else ""
        return f"{node.backend} there does not read {' and '.join(unread)}{remedy}"
    return None


def able_pool(facts: ModelFacts, nodes: Sequence[NodeFacts]) -> Pool:
    """The nodes that can run the model."""
    return pool_of([node for node in nodes if why_unable(facts, node) is None])


def pool_of(nodes: Sequence[NodeFacts]) -> Pool:
    """All of `nodes`."""
    by_host: dict[HostId, list[NodeFacts]] = defaultdict(list)
    for node in nodes:
        by_host[node.host].append(node)
    candidates: list[Candidate] = []
    shared: dict[HostId, int] = {}
    for host, members in by_host.items():
        # The members were asked one after another, so their view of the host may differ; the smallest is safe.
        host_budget = max(0, min(member.memory.host_budget_bytes for member in members))
        budgets = [max(0, min(member.memory.budget_bytes, host_budget)) for member in members]
        is_shared = sum(budgets) > host_budget
        if is_shared:
            shared[host] = host_budget
        candidates += [
            Candidate(member, budget, host if is_shared else None)
            for member, budget in zip(members, budgets, strict=True)
        ]
    candidates.sort(key=lambda each: (-each.budget_bytes, each.node.name, each.node.id))
    return Pool(tuple(candidates), dict(sorted(shared.items())))
