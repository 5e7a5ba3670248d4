"""What a node is told when it loads a stage: where the weights are, and who else may hold them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import messages
from cluster.errors import WireError
from cluster.nodes import GroupMemory
from cluster.plan import Assignment, Fence
from cluster.types import DeploymentId, DType, Epoch, LayerRange, ModelId, TensorSpec
from coordinator.install import Source, _assignment
from tests.clusters import node


def _member(address: str) -> Any:
    return SimpleNamespace(facts=SimpleNamespace(address=address))


def test_each_node_is_told_of_every_other_one_with_a_stage_or_without() -> None:
    members = {name: _member(f"127.0.0.1:{port}") for name, port in (("a", 1), ("b", 2), ("spare", 3))}
    plan: Any = SimpleNamespace(stages=[1, 2], layer_count=4, boundary=(), kv_tokens=8, context_tokens=8)
    stage: Any = SimpleNamespace(index=0, layers=LayerRange(0, 2))
    source = Source(ModelId("m"), "/models/m", 7433, 10, 4)
    fence = Fence(DeploymentId("d"), Epoch(1))
    told: Any = members
    assignment = _assignment(plan, stage, fence, members["a"], told, source)
    assert assignment.weights_address == "127.0.0.1:7433"
    assert assignment.peer_addresses == ("127.0.0.1:2", "127.0.0.1:3")
    assert assignment.bits == 4


def test_an_assignment_arrives_as_it_was_sent() -> None:
    assignment = Assignment(
        fence=Fence(DeploymentId("d"), Epoch(3)),
        model=ModelId("m"),
        stage=1,
        stage_count=2,
        layers=LayerRange(2, 4),
        layer_count=4,
        boundary=(TensorSpec("hidden", (16,), DType.BF16),),
        kv_tokens=64,
        context_tokens=32,
        vocab_size=100,
        local_folder="/models/m",
        weights_address="10.0.0.1:7433",
        peer_addresses=("10.0.0.2:1", "10.0.0.3:2"),
        bits=6,
    )
    for sent in (assignment, replace(assignment, bits=None)):
        assert messages.assignment_in(messages.assignment_out(sent, "c")) == sent
    with pytest.raises(WireError, match="packed in 4, 6, 8 bits or not at all, found 5"):
        messages.assignment_in(messages.assignment_out(replace(assignment, bits=5), "c"))


def test_a_node_is_described_with_the_formats_that_it_reads() -> None:
    facts = node("a", 8)
    assert messages.description_in(messages.description_out(facts, ""), "").formats == facts.formats != frozenset()


def test_a_node_is_described_with_the_control_groups_around_it() -> None:
    facts = node("a", 8, groups={"slice": 20, "scope": 10})
    found = messages.description_in(messages.description_out(facts, ""), "").memory
    assert found.groups == facts.memory.groups == (GroupMemory("slice", 20), GroupMemory("scope", 10))
