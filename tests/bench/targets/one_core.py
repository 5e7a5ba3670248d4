"""Target 10: what one core makes of one user's token, beside what reading the weights costs."""

from __future__ import annotations

from tests.bench.bench import LLAMA_ONE, ONE, Bench
from tests.bench.loads import token_s
from tests.bench.read_rate import read_bytes_s
from tests.bench.rows import Row, at_most
from tests.bench.targets.one_user import ARMS


def rows(bench: Bench) -> list[Row]:
    (engine_s,) = bench.passes(ONE, bench.shot(1))
    weight_bytes = sum(stage["weight_bytes"] for stage in bench.arm(ONE).status()["plan"]["stages"])
    best_s = weight_bytes / read_bytes_s()
    found = [
        Row(10, "the engine alone on one core: time per token", 1000 * engine_s, "ms", 1000 * best_s,
            note="the ceiling reads the stage's bytes once, embedding included, at the rate of a plain read"),
    ]  # fmt: skip
    if bench.has(LLAMA_ONE):
        llama_s = token_s(bench.load(1, *ARMS)[LLAMA_ONE])
        found += [
            Row(10, "the engine alone on one core, to llama.cpp on one core", engine_s / llama_s, "", None,
                at_most(1.25)),
            Row(10, "llama.cpp on one core: time per token", 1000 * llama_s, "ms"),
        ]  # fmt: skip
    return found
