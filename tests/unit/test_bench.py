"""What a benchmark makes of moments and counts."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.cli.bench_client import Answer
from cluster.cli.bench_measures import Load, Spread, inside, measure
from cluster.cli.bench_prompts import LONG_WORDS, SHORT_WORDS, TokenCost, text_of
from cluster.cli.bench_report import Table, page

LOAD = Load(users=2, prompt_tokens=100, output_tokens=4, rounds=1)
ANSWER = Answer(
    began_s=10.0, pieces_s=(10.5, 10.6, 10.7, 10.9), ended_s=11.0, prompt_tokens=98, cached_tokens=0, tokens=4
)


def test_percentiles_lie_between_the_values_that_they_separate() -> None:
    spread = Spread.of([float(value) for value in range(101)])
    assert spread == Spread(50.0, 95.0, 99.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([]) is None


def test_all_users_together_are_counted_from_the_first_request_to_the_last_token() -> None:
    later = replace(ANSWER, began_s=10.2, pieces_s=(11.2, 11.4, 11.6, 11.8), ended_s=12.0)
    result = measure("x", LOAD, [ANSWER, later], None)
    assert result.tokens_s == pytest.approx(8 / 2.0)
    assert result.first is not None and result.first.p50_s == pytest.approx((0.5 + 1.0) / 2)
    assert result.gap is not None and result.gap.p50_s == pytest.approx(0.2)
    assert result.user_tokens_s == pytest.approx((3 / 0.4 + 3 / 0.6) / 2)


def test_failed_requests_are_told_and_their_times_left_out() -> None:
    failed = replace(ANSWER, pieces_s=(99.0,), tokens=1, problem="HTTP 429: full")
    result = measure("x", LOAD, [ANSWER, failed], None)
    assert result.problems == ("HTTP 429: full",)
    assert result.first is not None and result.first.p99_s == pytest.approx(0.5)


def status(busy: list[float], steps: int = 0, hops_s: float = 0.0) -> dict[str, object]:
    load = {"stages_busy_s": busy, "decode_steps": steps, "decode_hops_s": hops_s}
    return {"plan": {"boundary_bytes": 256}, "load": load}


def test_how_busy_stages_were_follows_from_what_they_computed_meanwhile() -> None:
    seen = inside(status([1.0, 2.0, 0.0], 100, 9.0), status([3.0, 2.5, 4.0], 150, 9.1), 4.0)
    assert seen is not None
    assert seen.busy == (0.5, 0.125, 1.0)
    assert (seen.hops_s, seen.bytes_per_token) == (pytest.approx(0.002), 512)


def test_nothing_is_said_of_hops_where_no_step_was_without_a_prompt() -> None:
    seen = inside(status([1.0], 100, 9.0), status([3.0], 100, 9.0), 4.0)
    assert seen is not None and seen.hops_s is None


@pytest.mark.parametrize("before", [None, {}, status([9.0, 9.0]), status([1.0])], ids=["none", "other", "anew", "cut"])
def test_nothing_is_said_of_stages_where_the_plan_changed_or_is_unknown(before: dict[str, object] | None) -> None:
    assert inside(before, status([2.0, 2.0]), 1.0) is None


def test_a_prompt_has_the_wanted_length_whatever_a_word_costs() -> None:
    cost = TokenCost.from_counts(12 + 2 * SHORT_WORDS, 12 + 2 * LONG_WORDS)
    assert cost is not None and (cost.fixed, cost.per_word) == (12.0, 2.0)
    assert cost.words_for(112) == 50
    assert cost.words_for(5) == 1
    assert TokenCost.from_counts(0, 0) is None


def test_no_two_prompts_begin_alike_and_a_seed_repeats_them() -> None:
    rng = random.Random(0)
    prompts = [text_of(20, rng) for _ in range(50)]
    assert len({tuple(prompt.split()[:6]) for prompt in prompts}) == 50
    assert text_of(20, random.Random(0)) == prompts[0]


def test_a_prompt_that_a_cache_knew_is_told() -> None:
    said = Console(record=True, width=200, file=io.StringIO())
    for cached in (0, 60):
        Table(said).add(measure("x", LOAD, [replace(ANSWER, cached_tokens=cached)], None))
    assert [line.strip() for line in said.export_text().splitlines() if "cache" in line] == [
        "of a prompt's tokens 60 came from a cache"
    ]


def test_the_page_names_every_endpoint_and_no_name_becomes_markup() -> None:
    results = [measure(name, LOAD, [ANSWER], None) for name in ("ours", "<script>")]
    assert "ours" in page(results) and "<script>" not in page(results)
    assert page(results).count("<polyline") == 4
