"""The arithmetic of `make bench`, with made-up numbers: ceilings and verdicts."""

from __future__ import annotations

import pytest

from tests.bench import ceilings
from tests.bench.page import quantity
from tests.bench.rows import Row, at_least, at_most, unmeasured


def test_a_token_of_one_user_takes_each_stage_once_and_its_hops() -> None:
    assert ceilings.token_s([0.010, 0.014], 0.003) == pytest.approx(0.027)
    assert ceilings.token_s([0.020], 0.002) == pytest.approx(0.022)


def test_a_full_pipeline_is_as_fast_as_its_slowest_stage() -> None:
    assert ceilings.steady_tokens_s([0.02, 0.04], rows=8) == pytest.approx(200)


def test_a_load_costs_the_slowest_stage_its_prompts_and_its_steps() -> None:
    # 4 users in steps of 2: 4 chunks of 0.1 s, then 2 * 10 steps of 0.05 s, for 4 * 11 tokens.
    rate = ceilings.load_tokens_s(
        users=4, prompt_tokens=100, output_tokens=11, decode=[0.05, 0.02], decode_rows=2, prefill=[0.1, 0.1], chunk=100
    )
    assert rate == pytest.approx(44 / (4 * 0.1 + 20 * 0.05))


def test_the_slowest_stage_of_a_load_is_the_one_with_most_work_of_both_kinds() -> None:
    both = {"users": 1, "prompt_tokens": 10, "output_tokens": 3, "decode_rows": 1, "chunk": 10}
    # Stage 0 has 3 + 2 * 1 s of work, stage 1 has 1 + 2 * 2 s: not 3 + 2 * 2.
    assert ceilings.load_tokens_s(decode=[1.0, 2.0], prefill=[3.0, 1.0], **both) == pytest.approx(3 / 5)  # type: ignore[arg-type]


def test_chunks_of_a_prompt_follow_one_another_through_the_stages() -> None:
    # Four chunks on stages of 0.2 and 0.3 s: the slower computes all, the faster is waited for once; two hops.
    assert ceilings.prompt_s([0.2, 0.3], 400, 100, 0.02) == pytest.approx(4 * 0.3 + 0.2 + 0.02)
    assert ceilings.prompt_s([0.5], 400, 100, 0.0) == pytest.approx(2.0)


def test_a_short_last_chunk_counts_by_its_length() -> None:
    assert ceilings.prompt_s([1.0], 250, 100, 0.0) == pytest.approx(2.5)


def test_prompts_that_came_at_once_are_through_when_all_are() -> None:
    assert ceilings.shared_prompts_s(32, 100, 400.0) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row(1, "x", 1.04, "", promise=at_most(1.05)), "holds"),
        (Row(1, "x", 1.05, "", promise=at_most(1.05)), "holds"),
        (Row(1, "x", 1.40, "", promise=at_most(1.05)), "**misses**: 25% less needed"),
        (Row(2, "x", 0.90, "", promise=at_least(0.9)), "holds"),
        (Row(2, "x", 0.60, "", promise=at_least(0.9)), "**misses**: 50% more needed"),
        (Row(2, "x", 3.00, "s"), ""),
        (unmeasured(9, "x", "no GPU here"), "not measured"),
    ],
)
def test_a_verdict_says_by_how_much_a_target_is_missed(row: Row, verdict: str) -> None:
    assert row.verdict == verdict


def test_numbers_have_as_many_digits_as_they_deserve() -> None:
    assert [quantity(*pair) for pair in ((0.4567, ""), (3.456, "ms"), (34.56, "ms"), (345.6, "tok/s"))] == [
        "0.46",
        "3.46 ms",
        "34.6 ms",
        "346 tok/s",
    ]
