"""Target 7: what the coordinator and the wire cost a token, and how many tokens the coordinator can carry."""

from __future__ import annotations

import importlib
import importlib.util

from cluster.cli.bench_measures import Load
from tests.bench.arms import Arm
from tests.bench.bench import ONE, TWO, Bench
from tests.bench.loads import IN_TOKENS, run_load, token_s
from tests.bench.rows import Row, at_most, unmeasured

_RATE = "tests.bench.coordinator_rate"


def rows(bench: Bench) -> list[Row]:
    return [row for name in (ONE, TWO) for row in _hop_rows(bench, bench.arm(name), has_target=name == TWO)]


def _hop_rows(bench: Bench, arm: Arm, *, has_target: bool) -> list[Row]:
    """Everything between a stage's computing and the next one's, the client's reading included."""
    # Of its own, so that the status' window holds these steps and no others.
    results = run_load([arm], Load(1, IN_TOKENS, 300, rounds=1), 1)[arm.name]
    times = arm.status()["load"]["token_time"]
    compute_s = sum(stage["compute_s"] for stage in times["stages"])
    hops = len(times["stages"])  # one over each boundary, and one back
    each_s = (token_s(results) - compute_s) / hops
    promise = at_most(0.5) if has_target else None
    return [
        Row(7, f"{arm.name}: a token's time beside computing, for each of {hops} hops", 1000 * each_s, "ms",
            1000 * bench.hop_s(), promise),
        Row(7, f"{arm.name}: of a token's time, outside the stages, as the coordinator sees it", 1000 * times["hops_s"],
            "ms", 1000 * hops * bench.hop_s()),
    ]  # fmt: skip


def coordinator_rows(quick: bool) -> list[Row]:
    """Token events that one core of coordinator carries, where that benchmark is there."""
    if importlib.util.find_spec(_RATE) is None:
        return [unmeasured(7, "coordinator alone, 64 streams: token events a second", "no benchmark of it yet")]
    found: list[Row] = importlib.import_module(_RATE).rows(quick=quick)
    return found
