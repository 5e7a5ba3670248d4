"""Machines that are called alike are told apart, and everyone else keeps their name."""

from __future__ import annotations

from dataclasses import replace

from cluster.nodes import told_apart
from cluster.types import NodeId
from tests.clusters import node


def test_a_second_node_of_the_same_name_gets_the_beginning_of_its_id() -> None:
    first, second = node("mini", 8), replace(node("mini", 8), id=NodeId("b" * 32))
    assert told_apart(second, [first]).name == "mini-bbbb"
    assert told_apart(second, [first]).id == second.id


def test_a_node_seen_twice_and_one_of_another_name_keep_theirs() -> None:
    mini, studio = node("mini", 8), node("studio", 8)
    assert told_apart(mini, [mini, studio]) is mini
