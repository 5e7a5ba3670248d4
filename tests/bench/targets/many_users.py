"""Target 2: sixteen users keep two nodes busy, and thirty-two more so. Target 6: how soon each of them reads."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from cluster.cli.bench_measures import Result
from tests.bench import ceilings
from tests.bench.bench import LLAMA, ONE, RPC, TWO, Bench
from tests.bench.loads import IN_TOKENS, tokens_s
from tests.bench.rows import NO_PEERS, Row, at_least, at_most, unmeasured
from tests.bench.stage_alone import passes_together

FEW, MANY = 16, 32
Results = Mapping[str, list[Result]]

_CHUNK = 100
"""Prompts of the load are chunks by themselves."""


def rows(bench: Bench) -> list[Row]:
    few, many = _loads(bench)
    best = {users: _ceiling(bench, users) for users in (FEW, MANY)}
    measured = {users: tokens_s(results[TWO]) for users, results in ((FEW, few), (MANY, many))}
    one = tokens_s(few[ONE])
    found = [
        Row(2, f"two nodes, {FEW} users: share of the ceiling", measured[FEW] / best[FEW], "", 1.0, at_least(0.9)),
        Row(2, f"two nodes with {MANY} users to one node with {FEW}", measured[MANY] / one, "", best[MANY] / one,
            at_least(1.6)),
        Row(2, f"two nodes, {FEW} users", measured[FEW], "tok/s", best[FEW], note=_busy(few[TWO])),
        Row(2, f"two nodes, {MANY} users", measured[MANY], "tok/s", best[MANY], note=_busy(many[TWO])),
        Row(2, f"one node, {FEW} users", one, "tok/s"),
    ]  # fmt: skip
    if not bench.has(RPC):
        found.append(unmeasured(2, f"two nodes, {FEW} users: to llama.cpp RPC", NO_PEERS))
    else:
        rpc, llama = tokens_s(few[RPC]), tokens_s(few[LLAMA])
        found += [
            Row(2, f"two nodes, {FEW} users: to llama.cpp RPC", measured[FEW] / rpc, "", best[FEW] / rpc,
                at_least(1.9)),
            Row(2, f"llama.cpp RPC, {FEW} users", rpc, "tok/s"),
            Row(2, f"llama.cpp, one process with both cores, {FEW} users", llama, "tok/s"),
        ]  # fmt: skip
    return found


def first_tokens(bench: Bench) -> list[Row]:
    """Target 6. Perfect sharing of the prefill rate: every prompt is through when all are."""
    few, many = _loads(bench)
    rate = _prefill_tokens_s(bench)
    shared_s = ceilings.shared_prompts_s(MANY, IN_TOKENS, rate)
    p50_s = median(result.first.p50_s for result in few[TWO] if result.first)
    p95_s = median(result.first.p95_s for result in many[TWO] if result.first)
    last_s = max(result.first.p99_s for result in many[TWO] if result.first)
    found = [
        Row(6, f"two nodes, {MANY} users: p95 of the first token, to perfect sharing", p95_s / shared_s, "", 1.0,
            at_most(2.5)),
        Row(6, f"two nodes, {FEW} users: median of the first token", p50_s, "s",
            ceilings.shared_prompts_s(FEW, IN_TOKENS, rate)),
        Row(6, f"two nodes, {MANY} users: p95 of the first token", p95_s, "s", shared_s),
        Row(6, f"two nodes, {MANY} users: p99 of the first token, worst round", last_s, "s",
            note="every answer came whole"),
    ]  # fmt: skip
    if not bench.has(RPC):
        found.append(unmeasured(6, f"two nodes, {FEW} users: median of the first token, to llama.cpp RPC", NO_PEERS))
    else:
        rpc_s = median(result.first.p50_s for result in few[RPC] if result.first)
        found += [
            Row(6, f"two nodes, {FEW} users: median of the first token, to llama.cpp RPC", p50_s / rpc_s, "",
                None, at_most(0.5)),
            Row(6, f"llama.cpp RPC, {FEW} users: median of the first token", rpc_s, "s"),
        ]  # fmt: skip
    return found


def _loads(bench: Bench) -> tuple[Results, Results]:
    return bench.load(FEW, ONE, TWO, RPC, LLAMA), bench.load(MANY, TWO)


def _ceiling(bench: Bench, users: int) -> float:
    decode_rows = users // len(bench.arm(TWO).stages)
    decode, prefill = bench.measure_alone(TWO, [bench.shot(decode_rows), bench.shot(1, 0, _CHUNK)], passes_together)
    return ceilings.load_tokens_s(
        users=users, prompt_tokens=IN_TOKENS, output_tokens=bench.effort.output_tokens,
        decode=decode, decode_rows=decode_rows, prefill=prefill, chunk=_CHUNK,
    )  # fmt: skip


def _prefill_tokens_s(bench: Bench) -> float:
    """What both nodes prefill together, in chunks of a prompt of this load."""
    return _CHUNK / max(bench.passes(TWO, bench.shot(1, 0, _CHUNK), passes_together))


def _busy(results: list[Result]) -> str:
    shares = [result.inside.busy for result in results if result.inside is not None]
    return "" if not shares else "stages busy " + ", ".join(f"{median(each):.0%}" for each in zip(*shares, strict=True))
