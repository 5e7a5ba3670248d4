"""Target 7: what the coordinator and the wire cost a token, and how many tokens the coordinator can carry."""

from __future__ import annotations

from cluster.cli.bench_measures import Load
from tests.bench import coordinator_rate, hop_time
from tests.bench.arms import Arm
from tests.bench.bench import ONE, TWO, Bench
from tests.bench.loads import IN_TOKENS, run_load, token_s
from tests.bench.roles import instant_cluster
from tests.bench.rows import Row, at_least, at_most

STREAMS = 64


def rows(bench: Bench) -> list[Row]:
    return [row for name in (ONE, TWO) for row in _hop_rows(bench, bench.arm(name), has_target=name == TWO)]


def _hop_rows(bench: Bench, arm: Arm, *, has_target: bool) -> list[Row]:
    """Everything between a stage's computing and the next one's, the client's reading included."""
    # Of its own, so that the status' window holds these steps and no others.
    results = run_load([arm], Load(1, IN_TOKENS, 300, rounds=1), 1)[arm.name]
    times = arm.status()["load"]["token_time"]
    compute_s = sum(stage["compute_s"] for stage in times["stages"])
    hops = len(times["stages"]) + 1  # into every stage, and back
    each_s = (token_s(results) - compute_s) / hops
    promise = at_most(0.5) if has_target else None
    return [
        Row(7, f"{arm.name}: a token's time beside computing, for each of {hops} hops", 1000 * each_s, "ms",
            1000 * bench.hop_s(), promise),
        Row(7, f"{arm.name}: of a token's time, outside the stages, as the coordinator sees it", 1000 * times["hops_s"],
            "ms", 1000 * bench.hops_s(arm.name)),
    ]  # fmt: skip


def coordinator_rows(seconds: float) -> list[Row]:
    """The coordinator before stages that compute nothing. What it uses of its core counts: the machine's other work
    hardly moves it."""
    with instant_cluster(in_flight=2) as cluster:
        rate = coordinator_rate.measure(cluster, streams=STREAMS, seconds=seconds)
    hop = hop_time.measure(2, seconds=seconds)
    return [
        Row(7, f"coordinator alone, {STREAMS} streams: token events a second of its core", rate.events_per_cpu_s,
            "events/s", None, at_least(10_000)),
        Row(7, f"coordinator alone, {STREAMS} streams: token events that arrived", rate.events_per_s, "events/s",
            note="stage and client share the other core"),
        Row(7, "two stages that compute nothing: a token's time for each of 3 hops", 1000 * hop.hop_s, "ms", None,
            at_most(0.5)),
    ]  # fmt: skip
