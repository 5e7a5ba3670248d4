"""Target 3: a long prompt is read faster by two nodes than by one."""

from __future__ import annotations

from tests.bench import ceilings
from tests.bench.bench import ONE, RPC, TWO, Bench
from tests.bench.loads import first_s, interleaved
from tests.bench.rows import Row, at_most
from tests.bench.stage_alone import Shot, passes_together

PROMPT = 2048
CHUNKS = (128, 256, 512)
"""Lengths of chunks that the ceiling is looked for among."""


def shots(bench: Bench) -> list[Shot]:
    """A chunk of each length in the middle of the prompt."""
    return [bench.shot(1, PROMPT // 2 - chunk // 2, chunk) for chunk in CHUNKS]


def rows(bench: Bench) -> list[Row]:
    answers = interleaved(
        [bench.arm(name) for name in (ONE, TWO, RPC) if bench.has(name)],
        bench.effort.rounds,
        lambda arm: arm.endpoint.ask(arm.endpoint.prompt(PROMPT), 1),
    )
    one_s, two_s = first_s(answers[ONE]), first_s(answers[TWO])
    alone = bench.measure_alone(ONE, shots(bench))
    together = bench.measure_alone(TWO, shots(bench), passes_together)
    best_one_s = min(ceilings.prompt_s(p, PROMPT, c, 0.0) for p, c in zip(alone, CHUNKS, strict=True))
    best_two_s = min(
        ceilings.prompt_s(p, PROMPT, c, bench.hops_s(TWO, c)) for p, c in zip(together, CHUNKS, strict=True)
    )
    found = [
        Row(3, f"{PROMPT} tokens: first token of two nodes to one", two_s / one_s, "", best_two_s / best_one_s,
            at_most(0.6)),
        Row(3, f"{PROMPT} tokens, one node: first token", one_s, "s", best_one_s),
        Row(3, f"{PROMPT} tokens, two nodes: first token", two_s, "s", best_two_s),
        Row(3, "one node: prefill", PROMPT / one_s, "tok/s", PROMPT / best_one_s),
        Row(3, "two nodes: prefill", PROMPT / two_s, "tok/s", PROMPT / best_two_s),
    ]  # fmt: skip
    if bench.has(RPC):
        found.append(Row(3, "llama.cpp RPC: prefill", PROMPT / first_s(answers[RPC]), "tok/s"))
    return found
