"""The nodes that may take part, in one order that does not depend on how they were listed.

Owns: whose memory is whose. Nodes of one host share its memory, and nodes of one control group its limit; where their
budgets together exceed it, the search has to watch the sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.models.facts import ModelFacts
from cluster.models.formats import HALF_EXPERTS
from cluster.nodes import NodeFacts
from cluster.types import Backend, HostId

Area = tuple[HostId, str]
"""Memory that nodes share: a host's, or that of a control group on it; a host's own has no second name."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that can run the model."""

    node: NodeFacts
    budget_bytes: int  # its own budget, and never more than that of an area around it
    shared: tuple[Area, ...]  # the areas around it whose nodes together could exceed them, the outermost first

    @property
    def kind(self) -> tuple[Backend, bool, int]:
        """Candidates of one kind can hold the same stages."""
        return self.node.backend, self.node.on_cpu, self.budget_bytes


@dataclass(frozen=True, slots=True)
class Pool:
    """The candidates, the largest budget first, and the budgets of shared areas."""

    candidates: tuple[Candidate, ...]
    shared_budgets: Mapping[Area, int]

    @property
    def usable_bytes(self) -> int:
        """Memory of all candidates, none counted twice."""
        return together(self.candidates, self.shared_budgets)

    def among(self, candidates: Iterable[Candidate]) -> Pool:
        """The pool of some of the candidates."""
        return pool_of([candidate.node for candidate in candidates])


def together(candidates: Iterable[Candidate], left: Mapping[Area, int]) -> int:
    """What the candidates can hold at most, where so much is left of the areas that they share."""
    amounts: dict[tuple[Area, ...], int] = defaultdict(int)
    for candidate in candidates:
        amounts[candidate.shared] += candidate.budget_bytes
    while inner := max(amounts, key=len, default=()):  # what a group holds counts as one node of what is around it
        amounts[inner[:-1]] += min(amounts.pop(inner), left[inner[-1]])
    return amounts.get((), 0)


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
    # Members were asked one after another, so their views of an area may differ; the smallest is safe.
    budgets: dict[Area, int] = {}
    for node in nodes:
        for area, budget in _areas(node).items():
            budgets[area] = max(0, min(budget, budgets.get(area, budget)))
    own = [max(0, min([node.memory.budget_bytes, *(budgets[area] for area in _areas(node))])) for node in nodes]
    sums: dict[Area, int] = defaultdict(int)
    for node, budget in zip(nodes, own, strict=True):
        for area in _areas(node):
            sums[area] += budget
    shared = {area: budget for area, budget in sorted(budgets.items()) if sums[area] > budget}
    candidates = [
        Candidate(node, budget, tuple(area for area in _areas(node) if area in shared))
        for node, budget in zip(nodes, own, strict=True)
    ]
    candidates.sort(key=lambda each: (-each.budget_bytes, each.node.name, each.node.id))
    return Pool(tuple(candidates), shared)


def _areas(node: NodeFacts) -> dict[Area, int]:
    """What is around the node, the outermost first, with what all nodes there may hold together."""
    memory = node.memory
    inner = {(node.host, group.id): group.budget_bytes for group in memory.groups}
    return {(node.host, ""): memory.host_budget_bytes} | inner
