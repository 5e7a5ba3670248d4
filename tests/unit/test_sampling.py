"""node/sampling.py: one token from logits, the same one everywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadLogits
from cluster.steps import Draw, Sampling
from node import sampling as module
from node.sampling import BLOCK, Purpose, draw, gumbel, noise_key

Row = npt.NDArray[np.float32]

GOLDEN = [927, 88, 729, 519, 805, 346, 743, 806, 309, 149, 720, 877]
GOLDEN_KEY = 1321962074176129191
GOLDEN_NOISE = [0.9914716596510925, 1.1734784404007677, 0.32089642049309886]


def row(*values: float) -> Row:
    return np.array(values, dtype=np.float32)


def wide(size: int = 1000) -> Row:
    """Logits without randomness of numpy's, so that golden values never depend on its generators."""
    return (np.arange(size) * 7919 % size / size * 6.0).astype(np.float32)


def ask(prompt_tokens: int = 0, banned: tuple[int, ...] = (), **fields: float) -> Draw:
    return Draw(Sampling(**{"seed": 7, **fields}), prompt_tokens=prompt_tokens, banned=banned)  # type: ignore[arg-type]


def share(logits: Row, request: Draw, draws: int = 4000) -> npt.NDArray[np.float64]:
    """How often each id is drawn over many seeds."""
    counts = np.zeros(logits.size)
    for seed in range(draws):
        counts[draw(logits, replace(request, sampling=replace(request.sampling, seed=seed)), ())] += 1
    return counts / draws


def test_golden_draws_never_change() -> None:
    """Seeds are a promise to clients: an edit that changes these numbers breaks it."""
    found = [
        draw(wide(), ask(seed=seed), range(position)) for seed in (0, 1, -1, 2**63 - 1) for position in (0, 1, 500)
    ]
    assert found == GOLDEN


def test_golden_noise_never_changes() -> None:
    key = noise_key(seed=1, choice=2, position=3, purpose=Purpose.TOKEN)
    assert key == GOLDEN_KEY
    assert gumbel(key, np.array([0, 1, 151_999], dtype=np.uint64)).tolist() == pytest.approx(GOLDEN_NOISE, abs=1e-12)


def test_noise_hash_is_splitmix64() -> None:
    """The published first outputs of SplitMix64 for seed 0, as uniform numbers of 53 bits."""
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    expected = [-np.log(-np.log(((value >> 11) | 1) * 2.0**-53)) for value in published]
    assert gumbel(0, np.arange(3, dtype=np.uint64)).tolist() == pytest.approx(expected, abs=1e-12)


def test_noise_is_finite_at_both_ends_of_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplying by zero makes every hash 0, and so the lowest uniform number; the highest one is checked directly."""
    monkeypatch.setattr(module, "_MULTIPLIER_2", 0)
    assert np.isfinite(gumbel(0, np.arange(4, dtype=np.uint64))).all()
    assert ((2**64 - 1 >> 11) | 1) * 2.0**-53 < 1.0


def test_frequencies_follow_the_softmax() -> None:
    """Chi-square with 7 degrees of freedom stays below its 99.9 % quantile (24.3)."""
    logits = row(0.0, 1.0, 2.0, 0.5, -1.0, 1.5, 0.1, -2.0)
    for temperature in (0.7, 1.0, 1.8):
        weights = np.exp(logits.astype(np.float64) / temperature)
        expected = weights / weights.sum()
        found = share(logits, ask(temperature=temperature))
        assert (4000 * (found - expected) ** 2 / expected).sum() < 24.3


def test_every_part_of_the_key_changes_the_noise() -> None:
    keys = {
        noise_key(seed, choice, position, Purpose.TOKEN)
        for seed in range(5)
        for choice in range(5)
        for position in range(5)
    }
    assert len(keys) == 125


def test_choices_and_positions_differ() -> None:
    by_choice = {draw(wide(), ask(choice=choice), range(9)) for choice in range(16)}
    by_position = {draw(wide(), ask(), range(position)) for position in range(16)}
    assert len(by_choice) > 8
    assert len(by_position) > 8


def test_token_values_do_not_matter_without_penalties() -> None:
    assert draw(wide(), ask(), [1, 2, 3]) == draw(wide(), ask(), [9, 9, 9])


def test_noise_of_another_engine_changes_almost_nothing() -> None:
    """At most 1 of 300 draws differs under 1e-5 of logit noise over a large vocabulary."""
    generator = np.random.default_rng(3)
    differing = 0
    for seed in range(300):
        logits = (generator.normal(size=5000) * 3).astype(np.float32)
        other = logits + generator.uniform(-1e-5, 1e-5, size=5000).astype(np.float32)
        differing += draw(logits, ask(seed=seed), ()) != draw(other, ask(seed=seed), ())
    assert differing <= 1


def test_blocks_do_not_change_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = wide(BLOCK + 500)
    whole = [draw(logits, ask(seed=seed), ()) for seed in range(20)]
    monkeypatch.setattr(module, "BLOCK", 333)
    assert [draw(logits, ask(seed=seed), ()) for seed in range(20)] == whole


def test_a_filter_that_keeps_everything_changes_nothing() -> None:
    """The noise belongs to the token id, not to its place among the survivors."""
    for seed in range(20):
        assert draw(wide(), ask(seed=seed, top_k=999), ()) == draw(wide(), ask(seed=seed), ())


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert draw(row(1, 5, 5, 2), ask(temperature=0.0), ()) == 1


def test_greedy_needs_no_seed() -> None:
    assert {draw(wide(), ask(temperature=0.0, seed=seed), ()) for seed in range(5)} == {int(wide().argmax())}


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert draw(wide(), ask(temperature=temperature), ()) == int(wide().argmax())


def test_top_k_one_is_greedy_even_among_equals() -> None:
    assert {draw(row(1, 5, 5, 2), ask(seed=seed, top_k=1), ()) for seed in range(50)} == {1}


def test_top_k_keeps_exactly_k() -> None:
    assert np.flatnonzero(share(row(0, 2, 1, 1, 1), ask(top_k=3), 500)).tolist() == [1, 2, 3]


def test_top_k_larger_than_the_vocabulary_is_off() -> None:
    assert draw(wide(), ask(top_k=10_000), ()) == draw(wide(), ask(), ())


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = np.log(row(0.5, 0.3, 0.15, 0.05))
    assert np.flatnonzero(share(logits, ask(top_p=0.6), 500)).tolist() == [0, 1]
    assert np.flatnonzero(share(logits, ask(top_p=0.81), 500)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("top_p", [0.0, 1e-12])
def test_a_tiny_top_p_keeps_the_best(top_p: float) -> None:
    assert {draw(wide(), ask(seed=seed, top_p=top_p), ()) for seed in range(20)} == {int(wide().argmax())}


def test_top_p_counts_what_top_k_kept() -> None:
    """Of 0.4, 0.35 and 0.25 the best two hold 0.53 and 0.47: 0.5 of them needs both, of all three as well; but
    0.53 of the whole would need two while 0.53 of the best two needs one."""
    logits = np.log(row(0.4, 0.35, 0.25))
    assert np.flatnonzero(share(logits, ask(top_k=2, top_p=0.53), 300)).tolist() == [0]
    assert np.flatnonzero(share(logits, ask(top_p=0.53), 300)).tolist() == [0, 1]


def test_min_p_is_relative_to_the_best_and_after_temperature() -> None:
    logits = np.log(row(0.6, 0.3, 0.1))
    assert np.flatnonzero(share(logits, ask(min_p=0.4), 300)).tolist() == [0, 1]
    assert np.flatnonzero(share(logits, ask(min_p=0.4, temperature=0.5), 300)).tolist() == [0]


def test_min_p_of_one_keeps_only_the_best() -> None:
    assert {draw(wide(), ask(seed=seed, min_p=1.0), ()) for seed in range(20)} == {int(wide().argmax())}


def test_repetition_penalty_counts_prompt_and_output_and_knows_the_sign() -> None:
    """4 / 2 falls below 3; -1 * 2 falls below -1.5."""
    assert draw(row(4.0, 3.0), ask(1, temperature=0.0, repetition_penalty=2.0), [0]) == 1
    assert draw(row(-1.0, -1.5), ask(0, temperature=0.0, repetition_penalty=2.0), [0]) == 1


def test_presence_counts_once_and_only_the_output() -> None:
    logits = row(3.0, 2.5)
    assert draw(logits, ask(2, temperature=0.0, presence_penalty=0.4), [0, 0, 0, 0]) == 0
    assert draw(logits, ask(2, temperature=0.0, presence_penalty=0.6), [0, 0, 0]) == 1
    assert draw(logits, ask(2, temperature=0.0, presence_penalty=2.0), [0, 0]) == 0


def test_frequency_grows_with_every_occurrence() -> None:
    logits = row(3.0, 2.5)
    assert draw(logits, ask(1, temperature=0.0, frequency_penalty=0.3), [0, 0]) == 0
    assert draw(logits, ask(1, temperature=0.0, frequency_penalty=0.3), [0, 0, 0]) == 1


def test_negative_penalties_encourage() -> None:
    assert draw(row(1.0, 1.5), ask(0, temperature=0.0, presence_penalty=-1.0), [0]) == 0


def test_banned_tokens_are_never_drawn() -> None:
    best = int(wide().argmax())
    assert draw(wide(), ask(banned=(best,), temperature=0.0), ()) != best
    assert {draw(row(9, 1, 1), ask(banned=(0,), seed=seed), ()) for seed in range(50)} == {1, 2}
    # A large reward cannot bring a banned token back, and ids outside the vocabulary are no accident.
    assert draw(row(9, 1), ask(0, (0, 5, -1), temperature=0.0, presence_penalty=-2.0), [0]) == 1


def test_banning_everything_is_an_error() -> None:
    with pytest.raises(BadLogits, match="all 2 tokens are banned"):
        draw(row(1, 2), ask(banned=(0, 1)), ())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(BadLogits, match="1 of 3 logits at position 2"):
        draw(row(1, value, 2), ask(), [5, 6])


def test_the_logits_are_left_alone() -> None:
    logits = wide()
    logits.flags.writeable = False
    draw(logits, ask(1, (0,), presence_penalty=1.0, repetition_penalty=1.1, top_k=5, top_p=0.5, min_p=0.1), [1, 2])


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    tokens=st.lists(st.integers(0, 39), max_size=10),
    seed=st.integers(-(2**63), 2**63 - 1),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.1, 3),
)
def test_any_parameters_draw_a_token(
    logits: list[float], tokens: list[int], seed: int, temperature: float, top_k: int, top_p: float, min_p: float,
    presence: float, frequency: float, repetition: float,
) -> None:  # fmt: skip
    sampling = Sampling(seed, 0, temperature, top_k, top_p, min_p, presence, frequency, repetition)
    token = draw(row(*logits), Draw(sampling, prompt_tokens=3), tokens)
    assert 0 <= token < len(logits)
    assert token == draw(row(*logits), Draw(sampling, prompt_tokens=3), tuple(tokens))
