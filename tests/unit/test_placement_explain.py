"""What `potluck plan` shows adds up."""

from __future__ import annotations

import pytest

from cluster.cli.display import plan_lines
from cluster.models.formats import Packing
from cluster.nodes import NodeFacts
from cluster.placement import Ask, describe, place, rough_fits
from cluster.placement.pool import pool_of
from cluster.quantities import GIB, format_bytes
from cluster.types import Backend, Format
from tests.clusters import model, node

FACTS = model([1000] * 4, ends=(300, 1000, 2))
NODES = [node("a", 100_000), node("b", 50_000, host="box", host_budget_bytes=20_000)]


def test_rows_show_each_stage_beside_its_budget() -> None:
    plan = place(FACTS, NODES, Ask(8, stages_min=2))
    rows = describe(plan, FACTS, NODES)
    assert [(row.name, str(row.layers), row.budget_bytes) for row in rows] == [
        ("a", "0-2", 100_000),
        ("b", "3-3", 20_000),
    ]
    for row, stage in zip(rows, plan.stages, strict=True):
        assert row.free_bytes == row.budget_bytes - stage.memory_bytes
        assert row.weight_bytes == stage.weight_bytes
    assert [(row.reserve_bytes, row.total_bytes) for row in rows] == [(12_500, 100_000), (2_500, 20_000)]


def test_a_line_shows_weights_kv_workspace_and_reserve_of_each_node() -> None:
    mib = 1 << 20
    nodes = [node("a", 100 * mib), node("b", 50 * mib)]
    large = model([40 * mib] * 2, kv=mib, ends=(0, 0, 0))
    plan = place(large, nodes, Ask(4, stages_min=2))
    workspace, all_bytes = (format_bytes(n) for n in (plan.stages[0].workspace_bytes, plan.stages[0].memory_bytes))
    assert plan_lines(plan, large, tuple(nodes))[1].endswith(
        f"layers 0-0: 40.0 MiB weights + 4.0 MiB KV + {workspace} workspace = {all_bytes} of 100.0 MiB; "
        "12.5 MiB of 100.0 MiB kept in reserve"
    )


def test_shares_of_a_tokens_time_add_up_to_one() -> None:
    rows = describe(place(FACTS, NODES, Ask(8, stages_min=2)), FACTS, NODES)
    assert sum(row.streamed_share for row in rows) == pytest.approx(1)


def largest(nodes: list[object], bits: int) -> int:
    return max((row.billions for row in rough_fits(nodes) if row.fits and row.bits == bits), default=0)  # type: ignore[arg-type]


def test_a_pool_holds_larger_models_than_its_nodes() -> None:
    mac = [node(name, 20 * GIB, backend=Backend.MLX) for name in "ab"]
    assert (largest(mac[:1], 16), largest(mac, 16)) == (8, 14)
    assert (largest(mac[:1], 4), largest(mac, 4)) == (32, 32)


def test_packed_models_need_nodes_that_read_them() -> None:
    assert largest([node("a", 80 * GIB, formats=frozenset({Format(Packing.NONE)}))], 4) == 0
    assert largest([node("a", 80 * GIB)], 4) == 120


def test_groups_of_one_machine_count_apart_and_the_machine_bounds_their_sum() -> None:
    def in_groups(machine: int, **groups: int) -> list[NodeFacts]:
        nodes = {"a": "p", "b": "p", "c": "q"}
        return [
            node(name, 8 * GIB, host="box", host_budget_bytes=machine, groups={group: groups[group]})
            for name, group in nodes.items()
        ]

    assert pool_of(in_groups(64 * GIB, p=8 * GIB, q=6 * GIB)).usable_bytes == 14 * GIB
    assert pool_of(in_groups(12 * GIB, p=8 * GIB, q=6 * GIB)).usable_bytes == 12 * GIB
    assert pool_of(in_groups(64 * GIB, p=64 * GIB, q=64 * GIB)).usable_bytes == 24 * GIB


def test_a_shared_host_counts_once() -> None:
    pair = [node(name, 20 * GIB, host="box", host_budget_bytes=20 * GIB) for name in "ab"]
    assert largest(pair, 16) == 8


def test_rows_come_from_small_to_large() -> None:
    rows = rough_fits([node("a", GIB)])
    assert [row.needed_bytes for row in rows if row.bits == 16] == sorted(
        row.needed_bytes for row in rows if row.bits == 16
    )
    assert not any(row.fits for row in rows)


def test_a_pool_that_is_too_small_is_not_said_to_read_nothing() -> None:
    assert {row.readers for row in rough_fits([node("a", 100 << 20)])} == {1}
    plain = rough_fits([node("a", 80 * GIB, formats=frozenset({Format(Packing.NONE)}))])
    assert {row.bits: row.readers for row in plain} == {16: 1, 8: 0, 4: 0}
