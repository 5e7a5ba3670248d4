"""Placement keeps its promises on thousands of random clusters, and agrees with brute force on small ones."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DoesNotFit
from cluster.models.facts import ModelFacts
from cluster.nodes import NodeFacts
from cluster.placement import Ask, place, stage_cost
from cluster.placement.ask import AUTO_CONTEXT_MIN, CONTEXT_STEP
from cluster.placement.costs import NEVER, CostTable
from cluster.plan import Plan
from cluster.types import HostId, LayerRange
from tests.clusters import model, node, random_model, random_nodes, with_memory

SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module", autouse=True)
def brief_refusals() -> Iterator[None]:
    """A refusal's text places the model some fifty times over; it is tested in test_placement_refusal.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.placement.planner.refuse", lambda *_, **__: "it does not fit")
        yield


def seeded(examples: int) -> settings:
    return settings(max_examples=examples)


def random_ask(rng: random.Random, nodes: Sequence[NodeFacts]) -> Ask:
    first = rng.choice([None, *nodes])
    return Ask(8, users=rng.randint(1, 3), stages_min=rng.choice([1, 1, 1, 2, 3]), first=first.id if first else None)


def place_or_none(facts: ModelFacts, nodes: Sequence[NodeFacts], ask: Ask) -> Plan | None:
    try:
        return place(facts, nodes, ask)
    except DoesNotFit:
        return None


def around(each: NodeFacts) -> dict[tuple[HostId, str], int]:
    """The machine and the control groups that a node shares, with the budgets of their nodes together."""
    groups = {(each.host, group.id): group.budget_bytes for group in each.memory.groups}
    return {(each.host, ""): each.memory.host_budget_bytes, **groups}


def area_budgets(nodes: Sequence[NodeFacts]) -> dict[tuple[HostId, str], int]:
    found: dict[tuple[HostId, str], int] = {}
    for each in nodes:
        for area, budget in around(each).items():
            found[area] = min(budget, found.get(area, NEVER))
    return found


@seeded(1000)
@given(SEEDS)
def test_every_layer_is_owned_once_within_every_budget(seed: int) -> None:
    rng = random.Random(seed)
    facts = random_model(rng, 30)
    nodes = random_nodes(rng, facts, 6)
    plan = place_or_none(facts, nodes, ask := random_ask(rng, nodes))
    if plan is None:
        return
    by_id = {each.id: each for each in nodes}
    assert [layer for stage in plan.stages for layer in stage.layers] == list(range(facts.layer_count))
    assert len({stage.node for stage in plan.stages}) == len(plan.stages) >= ask.stages_min
    assert {stage.layers.first for stage in plan.stages} <= facts.legal_cuts
    used: dict[tuple[HostId, str], int] = defaultdict(int)
    for stage in plan.stages:
        cost = stage_cost(facts, stage.layers, stage.backend, context=8, users=ask.users, on_cpu=True)
        found = (stage.weight_bytes, stage.kv_bytes, stage.workspace_bytes, stage.streamed_bytes)
        assert found == (cost.weight_bytes, cost.kv_bytes, cost.workspace_bytes, cost.streamed_bytes)
        assert stage.memory_bytes <= by_id[stage.node].memory.budget_bytes
        assert stage.backend == by_id[stage.node].backend
        assert stage.backend in facts.backends
        assert by_id[stage.node].formats >= facts.formats
        for area in around(by_id[stage.node]):
            used[area] += stage.memory_bytes
    budgets = area_budgets(nodes)
    assert all(used[area] <= budgets[area] for area in used)
    assert {stage.node for stage in plan.stages} | {left for left, _ in plan.left_out} == set(by_id)


def every_placement(facts: ModelFacts, nodes: Sequence[NodeFacts], ask: Ask, count: int) -> Iterator[tuple[bool, int]]:
    """All placements in `count` stages that fit, written as plainly as possible: whether `first` is where it should
    be, and the largest stage."""
    usable = [each for each in nodes if each.backend in facts.backends and each.formats >= facts.formats]
    budgets = area_budgets(usable)
    inner_cuts = sorted(facts.legal_cuts - {0})
    for inner in itertools.combinations(inner_cuts, count - 1):
        ends = [0, *inner, facts.layer_count]
        layers = [LayerRange(first, last) for first, last in itertools.pairwise(ends)]
        costs = {
            backend: [stage_cost(facts, each, backend, context=8, users=ask.users, on_cpu=True) for each in layers]
            for backend in facts.backends
        }
        for order in itertools.permutations(usable, count):
            used: dict[tuple[HostId, str], int] = defaultdict(int)
            for each, position in zip(order, range(count), strict=True):
                needed = costs[each.backend][position].memory_bytes
                for area in around(each):
                    used[area] += needed
                if needed > each.memory.budget_bytes or any(used[area] > budgets[area] for area in around(each)):
                    break
            else:
                largest = max(costs[each.backend][i].streamed_bytes for i, each in enumerate(order))
                yield ask.first in {each.id for each in order[1:]}, largest


def brute_force(facts: ModelFacts, nodes: Sequence[NodeFacts], ask: Ask) -> tuple[int, bool, int] | None:
    """The fewest stages that fit, whether `first` has to stand elsewhere than first, and the largest stage then."""
    for count in range(ask.stages_min, len(nodes) + 1):
        best = min(every_placement(facts, nodes, ask, count), default=None)
        if best is not None:
            return (count, *best)
    return None


@seeded(1000)
@given(SEEDS)
def test_agrees_with_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    facts = random_model(rng, 8)
    nodes = random_nodes(rng, facts, 4)
    plan = place_or_none(facts, nodes, ask := random_ask(rng, nodes))
    found = plan and (
        len(plan.stages),
        ask.first in {stage.node for stage in plan.stages[1:]},
        max(stage.streamed_bytes for stage in plan.stages),
    )
    assert found == brute_force(facts, nodes, ask)


@seeded(300)
@given(SEEDS)
def test_agrees_with_brute_force_where_two_crowded_hosts_decide(seed: int) -> None:
    rng = random.Random(seed)
    facts = random_model(rng, 8)
    backend = min(facts.backends)
    whole = stage_cost(facts, LayerRange(0, facts.layer_count), backend, context=8, users=1, on_cpu=True).memory_bytes
    share = rng.uniform(0.2, 0.8)
    budgets = {"x": int(whole * share) + rng.randint(500, 1500), "y": int(whole * (1 - share)) + rng.randint(500, 1500)}
    nodes = [
        node(f"n{index}", rng.randint(whole // 4, whole), host=host, host_budget_bytes=budgets[host], backend=backend)
        for index, host in enumerate(rng.choice(["xxyy", "xyyy", "xyxy"]))
    ]
    ask = Ask(8, stages_min=rng.randint(2, 4))
    plan = place_or_none(facts, nodes, ask)
    found = plan and (len(plan.stages), False, max(stage.streamed_bytes for stage in plan.stages))
    assert found == brute_force(facts, nodes, ask)


@seeded(300)
@given(SEEDS)
def test_agrees_with_brute_force_where_groups_within_a_machine_decide(seed: int) -> None:
    """Two groups of two nodes, which together have more than the machine, and each a little more than its share."""
    rng = random.Random(seed)
    facts = random_model(rng, 8)
    backend = min(facts.backends)
    whole = stage_cost(facts, LayerRange(0, facts.layer_count), backend, context=8, users=1, on_cpu=True).memory_bytes
    share = rng.uniform(0.2, 0.8)
    budgets = {"p": int(whole * share) + rng.randint(500, 1500), "q": int(whole * (1 - share)) + rng.randint(500, 1500)}
    machine = whole + rng.randint(0, 2500)
    nodes = [
        node(
            f"n{index}",
            rng.randint(whole // 4, whole),
            host="x",
            host_budget_bytes=machine,
            groups={group: budgets[group]},
            backend=backend,
        )
        for index, group in enumerate(rng.choice(["ppqq", "pqqq", "pqpq"]))
    ]
    ask = Ask(8, stages_min=rng.randint(1, 4))
    plan = place_or_none(facts, nodes, ask)
    found = plan and (len(plan.stages), False, max(stage.streamed_bytes for stage in plan.stages))
    assert found == brute_force(facts, nodes, ask)


@seeded(200)
@given(SEEDS)
def test_the_order_of_the_nodes_changes_nothing(seed: int) -> None:
    rng = random.Random(seed)
    facts = random_model(rng, 12)
    nodes = random_nodes(rng, facts, 10)
    ask = random_ask(rng, nodes)
    expected = place_or_none(facts, nodes, ask)
    rng.shuffle(nodes)
    assert place_or_none(facts, nodes, ask) == expected


@seeded(500)
@given(SEEDS)
def test_more_memory_never_turns_success_into_refusal(seed: int) -> None:
    rng = random.Random(seed)
    facts = random_model(rng, 10)
    nodes = random_nodes(rng, facts, 6)
    ask = random_ask(rng, nodes)
    if place_or_none(facts, nodes, ask) is None:
        return
    more_in_groups = {name: rng.choice([0, 100, 3000]) for name in ("slice", "p", "q")}
    grown = [
        with_memory(
            each,
            budget_bytes=each.memory.budget_bytes + rng.choice([0, 100, 3000]),
            host_budget_bytes=each.memory.host_budget_bytes + rng.choice([0, 100, 3000]),
            more_in_groups=more_in_groups,
        )
        for each in nodes
    ]
    assert place_or_none(facts, grown, ask) is not None


@seeded(30)
@given(SEEDS)
def test_beyond_eight_nodes_more_memory_never_hurts_either(seed: int) -> None:
    rng = random.Random(seed)
    facts = model([rng.randint(300, 900)] * rng.randint(9, 30), ends=(100, 100, 2))
    nodes = [node(f"n{index}", rng.randint(1500, 3500)) for index in range(rng.randint(9, 14))]
    if place_or_none(facts, nodes, Ask(8)) is None:
        return
    extra = rng.randint(1, 2000)
    lucky = rng.randrange(len(nodes))
    grown = nodes[lucky].memory.budget_bytes + extra
    nodes[lucky] = with_memory(nodes[lucky], budget_bytes=grown, host_budget_bytes=grown)
    assert place_or_none(facts, nodes, Ask(8)) is not None


@seeded(200)
@given(SEEDS)
def test_an_automatic_context_is_the_longest_that_fits(seed: int) -> None:
    rng = random.Random(seed)
    facts = random_model(rng, 6, context=rng.choice([100, 8192, 8448, 9000, 40_960]))
    floor = min(AUTO_CONTEXT_MIN, facts.context_tokens)
    nodes = random_nodes(rng, facts, 3, context=rng.randint(floor, facts.context_tokens))
    ask = Ask(None, stages_min=rng.randint(1, 2))
    plan = place_or_none(facts, nodes, ask)
    if plan is None:
        assert place_or_none(facts, nodes, Ask(floor, stages_min=ask.stages_min)) is None
        return
    assert floor <= plan.context_tokens <= facts.context_tokens
    if plan.context_tokens < facts.context_tokens:
        assert plan.context_tokens % CONTEXT_STEP == 0
        longer = min(plan.context_tokens + CONTEXT_STEP, facts.context_tokens)
        assert place_or_none(facts, nodes, Ask(longer, stages_min=ask.stages_min)) is None


@seeded(200)
@given(SEEDS)
def test_the_tables_agree_with_the_cost_of_a_single_stage(seed: int) -> None:
    rng = random.Random(seed)
    facts = random_model(rng, 8)
    table = CostTable(facts, context=8, users=2)
    for begin, end in itertools.combinations(range(len(table.cuts)), 2):
        for backend in facts.backends:
            cost = stage_cost(facts, table.range_of(begin, end), backend, context=8, users=2, on_cpu=True)
            assert table.memory(backend, True)[begin, end] == cost.memory_bytes
            assert table.streamed[begin, end] == cost.streamed_bytes
