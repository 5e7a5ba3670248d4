"""coordinator/lanes.py: turns in proportion to tokens."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from coordinator.lanes import CLIENTS_KEPT, Clocks, Lane, Turns

BOTH = (Lane.INTERACTIVE, Lane.BATCH)


def served(turns: Turns, rounds: int, sizes: dict[str, int], lane: Lane = Lane.INTERACTIVE) -> Counter[str]:
    """Tokens that clients got who always want more."""
    tokens: Counter[str] = Counter()
    for _ in range(rounds):
        client = turns.client(lane, sizes)
        turns.serve(lane, client, sizes[client])
        tokens[client] += sizes[client]
    return tokens


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 500), min_size=2))
def test_clients_that_always_want_more_get_the_same_tokens(sizes: dict[str, int]) -> None:
    tokens = served(Turns(), 200, sizes)
    assert max(tokens.values()) - min(tokens[name] for name in sizes) <= 2 * max(sizes.values())


def test_a_newcomer_starts_at_the_present() -> None:
    """Neither is it behind for what others got before, nor may it catch up for the time it was away."""
    turns = Turns()
    served(turns, 100, {"old": 10})
    tokens = served(turns, 100, {"old": 10, "new": 10})
    assert abs(tokens["old"] - tokens["new"]) <= 20


def test_while_both_lanes_want_more_a_tenth_is_the_batch_lanes() -> None:
    turns, tokens = Turns(), Counter[Lane]()
    for _ in range(1000):
        lane = turns.lanes(BOTH)[0]
        turns.serve(lane, "client", 10)
        tokens[lane] += 10
    assert abs(tokens[Lane.BATCH] - 1000) <= 20


def test_among_equals_the_interactive_lane_goes_first() -> None:
    assert Turns().lanes(reversed(BOTH)) == [Lane.INTERACTIVE, Lane.BATCH]


def test_batch_work_before_is_no_advantage_over_an_interactive_newcomer() -> None:
    turns = Turns()
    for _ in range(5):
        turns.serve(Lane.BATCH, "client", 1000)
    assert turns.lanes(BOTH)[0] is Lane.INTERACTIVE


def test_what_was_not_used_is_given_back() -> None:
    turns = Turns()
    turns.serve(Lane.INTERACTIVE, "a", 100)
    turns.serve(Lane.INTERACTIVE, "b", 50)
    assert turns.client(Lane.INTERACTIVE, "ab") == "b"
    turns.correct(Lane.INTERACTIVE, "a", -90)
    assert turns.client(Lane.INTERACTIVE, "ab") == "a"


def test_clients_that_are_gone_are_forgotten() -> None:
    clocks = Clocks()
    for number in range(3 * CLIENTS_KEPT):
        clocks.serve(str(number), 1)
    assert len(clocks._at) <= CLIENTS_KEPT
