"""From model facts, nodes and an ask to a plan.

Owns: how many stages there are, which context `auto` means, and why a node gets nothing. As few nodes as memory
allows, because for one user a token's time is the sum over the stages, and each further one adds a hop; but at
least as many as were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import DoesNotFit
from cluster.models.facts import ModelFacts
from cluster.nodes import NodeFacts
from cluster.placement.ask import Ask, context_choices
from cluster.placement.costs import CostTable, stage_cost
from cluster.placement.pool import Candidate, Pool, able_pool, why_unable
from cluster.placement.refusal import refuse, refuse_count
from cluster.placement.search import StageSearch
from cluster.plan import Plan, Stage
from cluster.quantities import format_bytes
from cluster.types import LayerRange, NodeId


@dataclass(frozen=True, slots=True)
class Solution:
    """Who holds which layers, for one context."""

    context: int
    stages: tuple[tuple[Candidate, LayerRange], ...]


def place(facts: ModelFacts, nodes: Sequence[NodeFacts], ask: Ask) -> Plan:
    """The plan for `nodes`, or DoesNotFit."""
    contexts = context_choices(facts, ask)
    pool = able_pool(facts, nodes)
    most = min(len(pool.candidates), len(facts.legal_cuts | {0}))
    if ask.stages_min > most or not pool.candidates:
        raise DoesNotFit(refuse_count(facts, nodes, pool, ask))
    solution = solve_longest(facts, pool, ask, contexts)
    if solution is None:
        raise DoesNotFit(refuse(facts, pool, ask, contexts[0], fits=is_placeable))
    return _plan(facts, nodes, solution, pool, ask)


def solve_longest(facts: ModelFacts, pool: Pool, ask: Ask, contexts: range) -> Solution | None:
    """The best stages for the longest of `contexts` (ascending) that can be placed."""
    if not is_placeable(facts, pool, ask, contexts[0]):
        return None
    # What fits with more context fits with less, so bisect. The longest comes first: a large pool can hold it.
    best, low, high = contexts[0], 1, len(contexts) - 1
    middle = high
    while low <= high:
        context = min(contexts[middle], facts.context_tokens)
        if is_placeable(facts, pool, ask, context):
            best, low = context, middle + 1
        else:
            high = middle - 1
        middle = (low + high) // 2
    return solve(facts, pool, ask, best)


def solve(facts: ModelFacts, pool: Pool, ask: Ask, context: int) -> Solution | None:
    """The best stages for exactly this context, with the fewest nodes that do."""
    table = CostTable(facts, context=context, users=ask.users)
    search = StageSearch(table, pool, ask.first)
    found = (search.best(count) for count in _counts(table, pool, ask))
    stages = next((stages for stages in found if stages is not None), None)
    return None if stages is None else Solution(context, tuple(stages))


def is_placeable(facts: ModelFacts, pool: Pool, ask: Ask, context: int) -> bool:
    """Whether any stages do, without looking for the best."""
    table = CostTable(facts, context=context, users=ask.users)
    search = StageSearch(table, pool, ask.first)
    return any(search.any(count) for count in _counts(table, pool, ask))


def _counts(table: CostTable, pool: Pool, ask: Ask) -> range:
    """The numbers of stages that come into question, the fewest first."""
    return range(ask.stages_min, min(len(pool.candidates), table.groups) + 1)


def _plan(facts: ModelFacts, nodes: Sequence[NodeFacts], solution: Solution, pool: Pool, ask: Ask) -> Plan:
    stages = []
    for index, (candidate, layers) in enumerate(solution.stages):
        node = candidate.node
        cost = stage_cost(facts, layers, node.backend, context=solution.context, users=ask.users, on_cpu=node.on_cpu)
        stages.append(
            Stage(
                index=index,
                layers=layers,
                members=(candidate.node.id,),
                backend=candidate.node.backend,
                weight_bytes=cost.weight_bytes,
                kv_bytes=cost.kv_bytes,
                workspace_bytes=cost.workspace_bytes,
                streamed_bytes=cost.streamed_bytes,
            )
        )
    return Plan(
        layer_count=facts.layer_count,
        stages=tuple(stages),
        context_tokens=solution.context,
        users=ask.users,
        boundary=facts.boundary,
        left_out=_left_out(facts, nodes, solution, pool, ask),
    )


def _left_out(
    facts: ModelFacts, nodes: Sequence[NodeFacts], solution: Solution, pool: Pool, ask: Ask
) -> tuple[tuple[NodeId, str], ...]:
    """Every node without a stage, with its reason; sorted by name."""
    users = {candidate.node.id for candidate, _ in solution.stages}
    by_id = {candidate.node.id: candidate for candidate in pool.candidates}
    count = len(solution.stages)
    reasons = []
    for node in sorted(nodes, key=lambda node: (node.name, node.id)):
        if node.id in users:
            continue
        if (unable := why_unable(facts, node)) is not None:
            reason = unable
        elif (least := _smallest_stage(facts, node, solution.context, ask.users)) > by_id[node.id].budget_bytes:
            reason = (
                f"its {format_bytes(by_id[node.id].budget_bytes)} are too few for even one layer, "
                f"which takes {format_bytes(least)} with its cache and workspace"
            )
        else:
            stages = "one stage" if count == 1 else f"{count} stages"
            reason = f"not needed: the model fits in {stages}, and each further stage costs every token a hop"
        reasons.append((node.id, reason))
    return tuple(reasons)


def _smallest_stage(facts: ModelFacts, node: NodeFacts, context: int, users: int) -> int:
    table = CostTable(facts, context=context, users=users)
    return int(table.memory_on(node).min())
