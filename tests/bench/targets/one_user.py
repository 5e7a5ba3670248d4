"""Target 1: a second node must not make one user slower."""

from __future__ import annotations

from tests.bench import ceilings
from tests.bench.bench import LLAMA, LLAMA_ONE, ONE, RPC, TWO, Bench
from tests.bench.loads import token_s
from tests.bench.rows import Row, at_most
from tests.bench.stage_alone import passes_in_turn

ARMS = (ONE, TWO, RPC, LLAMA, LLAMA_ONE)


def rows(bench: Bench) -> list[Row]:
    results = bench.load(1, *ARMS)
    one_s, two_s = token_s(results[ONE]), token_s(results[TWO])
    shot = bench.shot(1)
    (engine_s,), stages_s = bench.passes(ONE, shot), bench.passes(TWO, shot, passes_in_turn)
    busy_s = bench.passes(TWO, shot)
    best_s = ceilings.token_s(stages_s, bench.hops_s(TWO))
    best_one_s = ceilings.token_s([engine_s], bench.hops_s(ONE))
    found = [
        Row(1, "two nodes: time per token, to the engine alone in one process on one core", two_s / engine_s, "",
            best_s / engine_s, at_most(1.05)),
        Row(1, "two nodes: time per token, to one node behind the same endpoint", two_s / one_s, "",
            best_s / best_one_s, at_most(1.05)),
        Row(1, "one node: time per token", 1000 * one_s, "ms", 1000 * best_one_s),
        Row(1, "two nodes: time per token", 1000 * two_s, "ms", 1000 * best_s),
        Row(1, "two nodes: passes by themselves, each stage resting while the other computes", 1000 * sum(stages_s),
            "ms", 1000 * sum(busy_s), note="the ceiling is the same passes without a rest"),
        Row(1, "one node: tokens a second", 1 / one_s, "tok/s", 1 / best_one_s),
        Row(1, "two nodes: tokens a second", 1 / two_s, "tok/s", 1 / best_s),
    ]  # fmt: skip
    if bench.has(RPC):
        rpc_s, llama_s = token_s(results[RPC]), token_s(results[LLAMA])
        found += [
            Row(1, "llama.cpp RPC: tokens a second", 1 / rpc_s, "tok/s"),
            Row(1, "llama.cpp, one process with both cores: tokens a second", 1 / llama_s, "tok/s"),
            Row(1, "llama.cpp RPC: time per token, to llama.cpp on one core", rpc_s / token_s(results[LLAMA_ONE]), ""),
        ]
    return found
