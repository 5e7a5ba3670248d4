"""The radix tree over tokens against the plain truth: every sequence's tokens compared one by one."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.types import SequenceId
from coordinator.prefixes import PrefixTree, Shared

SALTS = ["", "ada"]
Asked = tuple[str, list[int]]
TOKENS = st.lists(st.integers(0, 2), max_size=7)  # few tokens, so that much is shared
CHANGES = st.lists(st.tuples(st.integers(0, 7), st.none() | st.tuples(st.sampled_from(SALTS), TOKENS)), max_size=30)


def common(one: list[int], other: list[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


def truth(held: dict[SequenceId, Asked], salt: str, tokens: list[int]) -> dict[SequenceId, int]:
    found = {seq: common(theirs, tokens) for seq, (salted, theirs) in held.items() if salted == salt}
    return {seq: length for seq, length in found.items() if length > 0}


@settings(max_examples=400, deadline=None)
@given(changes=CHANGES, asked=st.lists(st.tuples(st.sampled_from(SALTS), TOKENS), max_size=5))
def test_the_tree_finds_what_a_comparison_of_everything_finds(
    changes: list[tuple[int, Asked | None]], asked: list[Asked]
) -> None:
    tree, held = PrefixTree(), dict[SequenceId, Asked]()
    for number, change in changes:
        seq = SequenceId(number)
        if change is None:
            tree.remove(seq)
            held.pop(seq, None)
        else:
            tree.put(seq, *change)
            held[seq] = change
        assert (len(tree), seq in tree) == (len(held), seq in held)
        for salt, tokens in [*asked, *held.values()]:
            found = list(tree.shared(salt, tokens))
            assert {each.seq: each.length for each in found} == truth(held, salt, tokens)
            assert len({each.seq for each in found}) == len(found)
            assert [each.length for each in found] == sorted((each.length for each in found), reverse=True)


@settings(max_examples=200, deadline=None)
@given(changes=CHANGES)
def test_nothing_is_left_of_what_was_removed(changes: list[tuple[int, Asked | None]]) -> None:
    """Whatever the order, the tree is as large as what it holds: a node for each end and each branch."""
    tree = PrefixTree()
    for number, change in changes:
        if change is None:
            tree.remove(SequenceId(number))
        else:
            tree.put(SequenceId(number), *change)
        assert count_nodes(tree) <= 2 * len(tree)
    for number in range(8):
        tree.remove(SequenceId(number))
    assert (len(tree), count_nodes(tree), tree._roots) == (0, 0, {})


def count_nodes(tree: PrefixTree) -> int:
    """Without roots."""
    nodes = [child for root in tree._roots.values() for child in root.children.values()]
    for node in nodes:
        nodes += node.children.values()
    return len(nodes)


def test_those_that_came_last_to_one_place_are_named_first() -> None:
    tree = PrefixTree()
    for number in (1, 2, 3):
        tree.put(SequenceId(number), "", [5, 6])
    tree.put(SequenceId(2), "", [5, 6])
    assert list(tree.shared("", [5, 6, 7])) == [Shared(SequenceId(number), 2) for number in (2, 3, 1)]


def test_another_salt_knows_nothing() -> None:
    tree = PrefixTree()
    tree.put(SequenceId(1), "ada", [5, 6])
    assert list(tree.shared("", [5, 6])) == list(tree.shared("bob", [5, 6])) == []


def test_a_full_tree_of_long_prompts_answers_in_time() -> None:
    """256 sequences of 8,000 tokens that part at random places. Asked for at every admission: 1 ms."""
    rng = random.Random(1)
    whole = [rng.randrange(150_000) for _ in range(8_000)]
    tree = PrefixTree()
    for number in range(256):
        at = rng.randrange(8_000)
        tree.put(SequenceId(number), "", [*whole[:at], *(rng.randrange(150_000) for _ in range(8_000 - at))])
    began = time.process_time()
    for _ in range(20):
        assert len(list(tree.shared("", whole))) >= 255
    assert (time.process_time() - began) / 20 < 3 * 0.001
