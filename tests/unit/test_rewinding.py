"""Where sequences can be cut back to: a rule that every stage answers by, whatever its own layers keep."""

from __future__ import annotations

import random

import pytest

from cluster.rewinding import (
    EXACT,
    REWIND_TOKENS,
    SNAPSHOT_TOKENS,
    SNAPSHOTS_MAX,
    Rewind,
    WaysBack,
    rewind_of,
    window_tokens_kept,
    window_tokens_max,
)

STATES = Rewind(every=SNAPSHOT_TOKENS)


def grown(rule: Rewind, *ends: int) -> WaysBack[str]:
    """After steps that ended there; each snapshot is named after its position."""
    ways, start = WaysBack[str](rule), 0
    for end in ends:
        ways.grew(end, f"at {end}" if ways.wants_snapshot(start, end) else None)
        start = end
    return ways


def test_the_rule_follows_from_the_whole_model() -> None:
    assert rewind_of([None, None], has_states=False) == EXACT
    assert rewind_of([None, 32, 16], has_states=False) == Rewind(window=16)
    assert rewind_of([None], has_states=True) == STATES


def test_where_no_layer_forgets_any_length_will_do() -> None:
    ways = grown(EXACT, 500)
    assert [ways.honoured(500, asked) for asked in (-1, 0, 1, 499, 500, 501)] == [0, 0, 1, 499, 500, 500]


def test_behind_a_window_the_last_positions_can_be_given_up() -> None:
    ways = grown(Rewind(window=16), 300, 500)
    back = 500 - REWIND_TOKENS
    assert [ways.honoured(500, asked) for asked in (500, back, back - 1, 16, 0)] == [500, back, 0, 0, 0]


def test_a_snapshot_from_before_the_window_is_no_way_back() -> None:
    """Its state would be right, and the keys of the window's first positions gone."""
    both = grown(Rewind(window=128, every=256), 256, 512, 768, 1000)
    assert both.honoured(1000, 990) == 0
    assert grown(Rewind(window=128, every=256), 256, 512, 768, 800).honoured(800, 790) == 768


def test_what_has_not_been_forgotten_can_be_given_up() -> None:
    kept = window_tokens_kept(16)
    assert grown(Rewind(window=16), kept - 1).honoured(kept - 1, 1) == 1
    assert grown(Rewind(window=16), kept).honoured(kept, 1) == 0


def test_a_sequence_that_was_cut_remembers_how_far_it_had_been() -> None:
    """The positions that a longer one had moved out do not come back."""
    ways = grown(Rewind(window=16), 500)
    back = 500 - REWIND_TOKENS
    ways.cut(back)
    assert (ways.honoured(back, back), ways.honoured(back, back - 1)) == (back, 0)
    twin = ways.forked(back)
    twin.grew(back + 1)
    assert (twin.honoured(back + 1, back), twin.honoured(back + 1, back - 1)) == (back, 0)


def test_states_go_back_to_the_last_snapshot_at_or_before_what_is_asked() -> None:
    ways = grown(STATES, 100, 300, 301, 520)
    asked = (520, 519, 300, 299, 0)
    assert [ways.honoured(520, length) for length in asked] == [520, 300, 300, 0, 0]
    assert (ways.snapshot_at(300), ways.snapshot_at(301)) == ("at 300", None)


@pytest.mark.parametrize(
    ("start", "end", "wants"), [(0, 255, False), (0, 256, True), (255, 256, True), (256, 511, False), (250, 900, True)]
)
def test_a_snapshot_is_left_by_the_step_that_passes_a_multiple(start: int, end: int, wants: bool) -> None:
    assert WaysBack[str](STATES).wants_snapshot(start, end) is wants
    assert not WaysBack[str](EXACT).wants_snapshot(start, end)


def test_a_cut_forgets_later_snapshots_and_a_fork_shares_earlier_ones() -> None:
    ways = grown(STATES, 256, 512)
    twin = ways.forked(300)
    assert twin.snapshots == ("at 256",)
    assert ways.snapshots == ("at 256", "at 512")
    ways.cut(256)
    assert ways.snapshots == ("at 256",)


def test_of_many_snapshots_an_early_one_and_the_last_stay() -> None:
    ways = grown(STATES, *range(256, 256 * 41, 256))
    assert ways.snapshots == ("at 512", "at 10240")
    assert SNAPSHOTS_MAX == 2


@pytest.mark.parametrize("seed", range(50))
def test_stages_that_differ_by_a_failed_step_agree_after_at_most_two_cuts(seed: int) -> None:
    """The one that had gone on has thinned its snapshots further. Who asks takes the smallest answer and asks again."""
    rng = random.Random(seed)
    ends = sorted(rng.sample(range(1, 4000), 30))
    common = rng.randrange(1, 30)
    behind, ahead = grown(STATES, *ends[:common]), grown(STATES, *ends)
    asked, lengths = ends[common - 1], [ends[common - 1], ends[-1]]
    for _ in range(2):
        lengths = [ways.honoured(length, asked) for ways, length in zip((behind, ahead), lengths, strict=True)]
        for ways, length in zip((behind, ahead), lengths, strict=True):
            ways.cut(length)
        asked = min(lengths)
    assert lengths[0] == lengths[1] == asked


@pytest.mark.parametrize("window", [1, 16, 128, 512, 1024, 4096])
def test_a_window_costs_an_eighth_more_than_it_needs(window: int) -> None:
    assert window_tokens_kept(window) == window + REWIND_TOKENS
    assert window_tokens_kept(window) + 8 <= window_tokens_max(window) <= window_tokens_kept(window) * 1.125
