"""A refusal's numbers are true: what it says is missing is missing, and each change that it offers would do."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DoesNotFit
from cluster.models.facts import ModelFacts
from cluster.models.formats import HALF_EXPERTS, Packing, Quantization
from cluster.nodes import NodeFacts
from cluster.placement import Ask, place, stage_cost
from cluster.placement.planner import is_placeable
from cluster.placement.pool import able_pool
from cluster.placement.refusal import Shortage, find_shortage, in_fewer_bits
from cluster.quantities import GIB, KIB, MIB
from cluster.types import Backend, DType, Format, LayerRange, NodeId
from tests.clusters import model, node, random_model, random_nodes, with_memory

EQUAL = model([1000] * 6, kv=0)
BASE = stage_cost(EQUAL, LayerRange(0, 1), Backend.TORCH, context=8, users=1, on_cpu=True).memory_bytes - 1000
LAST = stage_cost(EQUAL, LayerRange(5, 6), Backend.TORCH, context=8, users=1, on_cpu=True).memory_bytes - 1000


def shortage_of(facts: ModelFacts, nodes: list[NodeFacts], ask: Ask) -> Shortage:
    assert ask.context is not None
    return find_shortage(facts, able_pool(facts, nodes), ask, ask.context, fits=is_placeable)


def fits(facts: ModelFacts, nodes: list[NodeFacts], ask: Ask) -> bool:
    try:
        place(facts, nodes, ask)
    except DoesNotFit:
        return False
    return True


def refusal(facts: ModelFacts, nodes: list[NodeFacts], ask: Ask) -> str:
    with pytest.raises(DoesNotFit) as caught:
        place(facts, nodes, ask)
    return str(caught.value)


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_every_change_that_is_offered_would_do(seed: int) -> None:
    rng = random.Random(seed)
    facts = random_model(rng, 8, context=2000)
    nodes = random_nodes(rng, facts, 4, context=1000)
    able = [each for each in nodes if each.backend in facts.backends]
    ask = Ask(rng.choice([600, 1000, 2000]), users=rng.randint(1, 3), stages_min=rng.choice([1, 1, 2]))
    if len(able) < ask.stages_min or facts.layer_count < ask.stages_min or is_placeable_with(facts, able, ask):
        return
    found = shortage_of(facts, able, ask)
    if found.shorter_context:
        assert is_placeable_with(facts, able, replace(ask, context=found.shorter_context))
        longer = found.shorter_context + 256
        assert longer >= ask.context or not is_placeable_with(facts, able, replace(ask, context=longer))
    if found.fewer_users:
        assert is_placeable_with(facts, able, replace(ask, users=found.fewer_users))
        assert not is_placeable_with(facts, able, replace(ask, users=found.fewer_users + 1))
    if found.missing_on:
        lucky, extra = found.missing_on
        assert is_placeable_with(facts, with_more(able, lucky, extra), ask)
        step = next((unit for unit in (MIB, KIB) if extra >= unit), 10) // 10
        assert not is_placeable_with(facts, with_more(able, lucky, extra - step - 1), ask)
    if found.another_machine_bytes:
        another = node("another", found.another_machine_bytes, backend=min(facts.backends))
        assert is_placeable_with(facts, [*able, another], ask)
    if found.fewer_bits:
        bits, _ = found.fewer_bits
        assert is_placeable_with(in_fewer_bits(facts, bits), able, ask)


def is_placeable_with(facts: ModelFacts, nodes: list[NodeFacts], ask: Ask) -> bool:
    assert ask.context is not None
    return is_placeable(facts, able_pool(facts, nodes), ask, ask.context)


def with_more(nodes: list[NodeFacts], lucky: NodeFacts, extra: int) -> list[NodeFacts]:
    """`extra` bytes more in the machine of `lucky` and in the groups around it, all of them for it."""
    changed, groups = [], {group.id: extra for group in lucky.memory.groups}
    for each in nodes:
        if each.host == lucky.host:
            budget = each.memory.budget_bytes + (extra if each.id == lucky.id else 0)
            host_budget = each.memory.host_budget_bytes + extra
            more = with_memory(each, budget_bytes=budget, host_budget_bytes=host_budget, more_in_groups=groups)
            changed.append(more)
        else:
            changed.append(each)
    return changed


def test_says_how_much_is_missing_in_all() -> None:
    big = model([GIB] * 6, kv=0)
    message = refusal(big, [node("a", 2 * GIB), node("b", 2 * GIB)], Ask(8))
    assert message.startswith("PaperForCausalLM with 8 tokens of context for 1 user needs at least 6.0 GiB")
    assert "the machines offer 4.0 GiB: 2.0 GiB are missing in all" in message
    # A stage holds whole layers and its workspace, so the two machines hold one layer each.
    assert "one more machine with 4.1 GiB" in message


def test_says_on_which_machine_it_is_missing_when_only_the_cut_is_impossible() -> None:
    message = refusal(EQUAL, [node("large", 5 * 1000 + BASE), node("small", 900 + LAST)], Ask(8))
    assert "enough together, but no cut fits each of them: 100 B are missing on small" in message
    assert "100 B more on small" in message


def test_offers_the_longest_context_that_fits() -> None:
    chatty = model([1000] * 2, kv=1000, context=40_000)
    whole = stage_cost(chatty, LayerRange(0, 2), Backend.TORCH, context=1024, users=1, on_cpu=True).memory_bytes
    found = shortage_of(chatty, [node("a", whole)], Ask(20_000))
    assert found.shorter_context == 1024
    assert "a context of 1,024 tokens (--context 1024)" in refusal(chatty, [node("a", whole)], Ask(20_000))


def test_offers_the_most_users_that_fit() -> None:
    chatty = model([1000] * 2, kv=1000, context=40_000)
    whole = stage_cost(chatty, LayerRange(0, 2), Backend.TORCH, context=1024, users=3, on_cpu=True).memory_bytes
    message = refusal(chatty, [node("a", whole)], Ask(1024, users=8))
    assert "3 at once instead of 8 (--users 3)" in message


def test_offers_fewer_bits_only_where_they_are_read() -> None:
    big = replace(model([GIB] * 8, kv=0), dtype=DType.F16)
    plain = frozenset({Format(Packing.NONE), HALF_EXPERTS})
    assert "bits" not in refusal(big, [node("a", 6 * GIB, formats=plain)], Ask(8))
    message = refusal(big, [node("a", 6 * GIB, backend=Backend.MLX)], Ask(8))
    assert "--bits 8 (about 4.2 GiB of weights)" in message
    message = refusal(big, [node("a", 3 * GIB, backend=Backend.MLX)], Ask(8))
    assert "--bits 4 (about 2.2 GiB of weights)" in message


def test_a_model_that_is_packed_already_is_offered_as_another_version() -> None:
    packed = replace(model([GIB] * 8, kv=0), quantization=Quantization(Packing.AFFINE, 8, 64))
    message = refusal(packed, [node("a", 6 * GIB, backend=Backend.MLX)], Ask(8))
    assert "the same model in 4 bits (about 4.2 GiB of weights)" in message
    assert "--bits" in refusal(replace(packed, bits=8), [node("a", 6 * GIB, backend=Backend.MLX)], Ask(8))


def test_a_packed_model_is_not_offered_in_the_bits_that_it_has() -> None:
    packed = replace(
        model([GIB] * 8, backends=frozenset({Backend.MLX})), quantization=Quantization(Packing.AFFINE, 4, 64)
    )
    assert "bits" not in refusal(packed, [node("a", 3 * GIB, backend=Backend.MLX)], Ask(8))


def test_the_size_in_fewer_bits_counts_the_scales() -> None:
    half = replace(model([16_000]), dtype=DType.F16)
    assert in_fewer_bits(half, 4).layers[0].resident_bytes == dict.fromkeys(Backend, 4_500)
    assert in_fewer_bits(model([32_000]), 8).layers[0].resident_bytes == dict.fromkeys(Backend, 8_500)


def test_an_automatic_context_is_refused_below_the_least_that_is_useful() -> None:
    chatty = model([1000] * 2, kv=1000, context=40_000)
    whole = stage_cost(chatty, LayerRange(0, 2), Backend.TORCH, context=4096, users=1, on_cpu=True).memory_bytes
    message = refusal(chatty, [node("a", whole)], Ask(None))
    assert "with 8,192 tokens of context" in message
    assert "--context 4096" in message


def test_more_nodes_asked_for_than_there_are() -> None:
    message = refusal(EQUAL, [node("a", MIB)], Ask(8, stages_min=3))
    assert message == (
        "PaperForCausalLM: 3 nodes are needed, and 1 can run this model. Start more nodes, or ask for fewer"
    )


def test_nodes_that_cannot_run_the_model_are_named() -> None:
    packed = model([1000] * 6, backends=frozenset({Backend.MLX}))
    message = refusal(packed, [node("a", MIB), node("b", MIB)], Ask(8))
    assert "1 node is needed, and 0 can run this model; left out: a, b (it runs torch, and this" in message
    assert "model runs on mlx only)" in message


def test_formats_that_no_node_reads_are_named() -> None:
    packed = replace(model([1000] * 6), formats=frozenset({Format(Packing.FP8), HALF_EXPERTS}))
    message = refusal(packed, [node("a", MIB, formats=frozenset({Format(Packing.FP8)}))], Ask(8))
    assert (
        "left out: a (torch there does not read unpacked experts in 16 bits; --bits 8 would pack them). Start more"
        in message
    )


def test_more_stages_asked_for_than_layers() -> None:
    message = refusal(model([10] * 2), [node(name, MIB) for name in "abc"], Ask(8, stages_min=3))
    assert "a stage for each of 3 nodes is asked for, but the model can be cut into 2 at most" in message


def test_machines_too_small_for_any_layer_are_said_to_be() -> None:
    tiny = [node(name, BASE + 500, formats=frozenset({Format(Packing.NONE)})) for name in "abcdefghijklmno"]
    message = refusal(EQUAL, tiny, Ask(8, stages_min=6))
    assert "several of them are too small for even one layer" in message
    assert "No single change would make it fit" in message


def test_a_refused_pool_stays_refused_with_a_node_that_cannot_help() -> None:
    nodes = [node("a", 2 * BASE)]
    assert not fits(EQUAL, nodes, Ask(8))
    assert not fits(EQUAL, [*nodes, node("b", 1)], Ask(8, first=NodeId("id-b")))
