"""What placement decides, one decision at a time. Random clusters are in test_placement_properties.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import DoesNotFit, UsageError
from cluster.limits import RECORDED_BYTES_MAX, UNPACKED_BYTES_MAX, UNPACKED_ON_CPU_BYTES_MAX
from cluster.models.facts import ModelFacts
from cluster.models.formats import HALF_EXPERTS, Packing, Quantization
from cluster.placement import Ask, place, stage_cost
from cluster.placement.activations import COMPILED_BYTES
from cluster.plan import Plan
from cluster.quantities import MIB
from cluster.types import Backend, DType, Format, LayerRange, NodeId
from tests.clusters import model, node, with_memory


def needs(facts: ModelFacts, context: int, first: int, last: int) -> int:
    return stage_cost(facts, LayerRange(first, last), Backend.TORCH, context=context, users=1, on_cpu=True).memory_bytes


EQUAL = model([1000] * 6, kv=0)
ROOMY = 100_000


def layer_counts(plan: Plan) -> list[int]:
    return [len(stage.layers) for stage in plan.stages]


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_products_take_other_memory_on_a_processor_than_on_a_gpu(dtype: DType) -> None:
    packed = replace(EQUAL, dtype=dtype, quantization=Quantization(Packing.AFFINE, 4, 64))
    plain = stage_cost(replace(EQUAL, dtype=dtype), LayerRange(0, 6), Backend.TORCH, context=8, users=1, on_cpu=False)
    compiled = 0 if dtype is DType.F32 else COMPILED_BYTES
    on_cpu, on_gpu = UNPACKED_ON_CPU_BYTES_MAX + compiled, UNPACKED_BYTES_MAX + RECORDED_BYTES_MAX
    for device, more in (("cpu", on_cpu), ("cuda:0", on_gpu)):
        one = replace(node("a", 512 * MIB), device=device)
        (stage,) = place(packed, [one], Ask(8)).stages
        assert stage.workspace_bytes == plain.workspace_bytes - RECORDED_BYTES_MAX + more
        with pytest.raises(DoesNotFit):
            place(packed, [with_memory(one, budget_bytes=more, host_budget_bytes=more)], Ask(8))


def test_one_node_is_enough_when_it_is_large_enough() -> None:
    plan = place(EQUAL, [node("a", ROOMY), node("b", ROOMY)], Ask(8))
    assert layer_counts(plan) == [6]
    assert plan.left_out == (
        (NodeId("id-b"), "not needed: the model fits in one stage, and each further stage costs every token a hop"),
    )


def test_equal_nodes_get_equal_shares() -> None:
    nodes = [node(name, ROOMY) for name in "abc"]
    assert layer_counts(place(EQUAL, nodes, Ask(8, stages_min=3))) == [2, 2, 2]


def test_what_the_largest_stage_leaves_open_is_shared_evenly() -> None:
    heavy = model([1000] * 6, ends=(0, 3000, 0))
    nodes = [node(name, ROOMY) for name in "abc"]
    assert layer_counts(place(heavy, nodes, Ask(8, stages_min=3))) == [3, 2, 1]


def test_the_head_counts_as_time_and_the_embedding_does_not() -> None:
    nodes = [node(name, ROOMY) for name in "ab"]
    with_head = model([1000] * 6, ends=(0, 2000, 0))
    assert layer_counts(place(with_head, nodes, Ask(8, stages_min=2))) == [4, 2]
    with_embedding = model([1000] * 6, ends=(2000, 0, 0))
    assert layer_counts(place(with_embedding, nodes, Ask(8, stages_min=2))) == [3, 3]


def test_a_tied_head_takes_memory_on_both_ends_and_time_on_the_last() -> None:
    tied = model([1000] * 4, ends=(500, 0, 2), tied=True)
    whole = stage_cost(tied, LayerRange(0, 4), Backend.MLX, context=8, users=1, on_cpu=True)
    first = stage_cost(tied, LayerRange(0, 2), Backend.MLX, context=8, users=1, on_cpu=True)
    last = stage_cost(tied, LayerRange(2, 4), Backend.MLX, context=8, users=1, on_cpu=True)
    assert (whole.weight_bytes, first.weight_bytes, last.weight_bytes) == (4502, 2500, 2502)
    assert (whole.streamed_bytes, first.streamed_bytes, last.streamed_bytes) == (4502, 2000, 2502)


def test_the_coordinators_own_node_comes_first() -> None:
    nodes = [node("large", ROOMY), node("own", ROOMY - 1)]
    plan = place(EQUAL, nodes, Ask(8, stages_min=2, first=NodeId("id-own")))
    assert [stage.node for stage in plan.stages] == ["id-own", "id-large"]


def test_the_coordinators_own_node_stands_elsewhere_when_nothing_else_fits() -> None:
    facts = model([1000] * 3, ends=(5000, 0, 0))
    small = needs(facts, 8, 1, 3)
    nodes = [node("own", small), node("large", needs(facts, 8, 0, 1))]
    plan = place(facts, nodes, Ask(8, first=NodeId("id-own")))
    assert [stage.node for stage in plan.stages] == ["id-large", "id-own"]


def test_no_memory_of_a_host_is_promised_twice() -> None:
    whole = needs(EQUAL, 8, 0, 6)
    pair = [node(name, whole, host="box", host_budget_bytes=whole) for name in "ab"]
    assert layer_counts(place(EQUAL, pair, Ask(8))) == [6]
    with pytest.raises(DoesNotFit):
        place(EQUAL, pair, Ask(8, stages_min=2))


def test_nodes_that_cannot_run_the_model_are_left_out_with_the_reason() -> None:
    packed = model([1000] * 6, backends=frozenset({Backend.MLX}))
    plan = place(packed, [node("a", ROOMY), node("b", ROOMY, backend=Backend.MLX), node("c", 10)], Ask(8))
    assert plan.left_out == (
        (NodeId("id-a"), "it runs torch, and this model runs on mlx only"),
        (NodeId("id-c"), "it runs torch, and this model runs on mlx only"),
    )


def test_a_node_whose_engine_does_not_read_the_format_is_left_out_with_the_reason() -> None:
    facts = replace(model([1000] * 6), formats=frozenset(map(Format, (Packing.NONE, Packing.FP8))))
    reads = frozenset(map(Format, (Packing.NONE, Packing.AFFINE)))
    plan = place(facts, [node("a", ROOMY, formats=reads), node("b", ROOMY)], Ask(8))
    assert plan.left_out == ((NodeId("id-a"), "torch there does not read fp8"),)


def test_a_node_that_would_read_the_experts_when_they_are_packed_says_so() -> None:
    facts = replace(model([1000] * 6), formats=frozenset({Format(Packing.NONE), HALF_EXPERTS}))
    without = frozenset({Format(Packing.NONE), Format(Packing.AFFINE)})
    plan = place(facts, [node("a", ROOMY, formats=without), node("b", ROOMY)], Ask(8))
    reason = "torch there does not read unpacked experts in 16 bits; --bits 8 would pack them"
    assert plan.left_out == ((NodeId("id-a"), reason),)


def test_a_node_too_small_for_a_layer_is_left_out_with_the_reason() -> None:
    plan = place(EQUAL, [node("a", ROOMY), node("b", 1000)], Ask(8))
    assert "1000 B are too few for even one layer, which takes" in plan.left_out[0][1]


def test_layers_that_belong_together_stay_together() -> None:
    facts = model([1000] * 6, cuts=frozenset({0, 5}))
    assert layer_counts(place(facts, [node(name, ROOMY) for name in "ab"], Ask(8, stages_min=2))) == [5, 1]


def test_twenty_nodes_are_placed_too() -> None:
    facts = model([1000] * 20, kv=0)
    nodes = [node(f"n{index:02}", needs(facts, 8, 19, 20)) for index in range(20)]
    assert layer_counts(place(facts, nodes, Ask(8))) == [1] * 20


def test_a_context_beyond_the_models_own_is_a_wrong_argument() -> None:
    with pytest.raises(UsageError, match="at most 8 tokens, the model's own, found 9"):
        place(EQUAL, [node("a", ROOMY)], Ask(9))


@pytest.mark.parametrize("wrong", [{"context": 0}, {"users": 0}, {"users": 257}, {"stages_min": 0}])
def test_an_ask_for_nothing_is_a_wrong_argument(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Ask(**({"context": 8} | wrong))


def test_numbers_beyond_any_machine_do_not_wrap_around() -> None:
    facts = model([1 << 62] * 5, kv=1 << 62)
    with pytest.raises(DoesNotFit):
        place(facts, [node("a", 1 << 50)], Ask(8))
