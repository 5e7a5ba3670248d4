"""Target 4: a long prompt must not make running answers stutter."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from cluster.cli.bench_client import Answer
from cluster.cli.bench_measures import Load, Spread
from tests.bench.arms import Arm
from tests.bench.bench import ONE, TWO, Bench
from tests.bench.loads import IN_TOKENS, run_load, whole
from tests.bench.rows import Row, at_most

USERS, PROMPT = 4, 4096
_HEAD_START = 16
"""Tokens that the four have before the prompt comes."""
_OUTPUT_MAX = 1000


def rows(bench: Bench) -> list[Row]:
    names = [name for name in (TWO, ONE) if bench.has(name)]
    return [row for name in names for row in _arm_rows(bench, bench.arm(name), has_target=name == TWO)]


def _arm_rows(bench: Bench, arm: Arm, *, has_target: bool) -> list[Row]:
    alone = run_load([arm], Load(USERS, IN_TOKENS, bench.effort.output_tokens, rounds=1), 1)[arm.name][0]
    quiet_s = asyncio.run(_prompt(arm)).first_s or 0.0
    assert alone.gap is not None and alone.first is not None
    # The answers outlast the prompt, unless it takes three times as long beside them.
    output = min(_OUTPUT_MAX, 2 * _HEAD_START + math.ceil(3 * quiet_s / alone.gap.p50_s))
    gaps: list[float] = []
    beside_s = []
    for _ in range(bench.effort.rounds):
        wait_s = alone.first.p95_s + _HEAD_START * alone.gap.p50_s
        prompt, answers = asyncio.run(_beside(arm, output, wait_s))
        gaps += _gaps_during(prompt, answers)
        beside_s.append(prompt.first_s or 0.0)
    beside = Spread.of(gaps)
    if beside is None:
        return []
    promise = at_most(2.5) if has_target else None
    return [
        Row(4, f"{arm.name}: p99 gap beside a prompt of {PROMPT}, to the median gap without",
            beside.p99_s / alone.gap.p50_s, "", 1.0, promise),
        Row(4, f"{arm.name}: median gap of {USERS} answers alone", 1000 * alone.gap.p50_s, "ms"),
        Row(4, f"{arm.name}: median gap beside the prompt", 1000 * beside.p50_s, "ms"),
        Row(4, f"{arm.name}: p99 gap beside the prompt", 1000 * beside.p99_s, "ms", note=f"{len(gaps)} gaps"),
        Row(4, f"{arm.name}: the prompt's first token beside them", max(beside_s), "s", quiet_s,
            note="the ceiling is the same prompt's without them"),
    ]  # fmt: skip


async def _prompt(arm: Arm) -> Answer:
    return whole(await arm.endpoint.ask(arm.endpoint.prompt(PROMPT), 1))


async def _beside(arm: Arm, output: int, wait_s: float) -> tuple[Answer, Sequence[Answer]]:
    async def late() -> Answer:
        await asyncio.sleep(wait_s)
        return await _prompt(arm)

    prompt, *answers = await asyncio.gather(
        late(), *(arm.endpoint.ask(arm.endpoint.prompt(IN_TOKENS), output) for _ in range(USERS))
    )
    return prompt, [whole(answer) for answer in answers]


def _gaps_during(prompt: Answer, answers: Sequence[Answer]) -> list[float]:
    """Gaps of which a part lies between the prompt's arrival and its first token."""
    until_s = prompt.pieces_s[0]
    return [
        after - before
        for answer in answers
        for before, after in zip(answer.pieces_s, answer.pieces_s[1:], strict=False)
        if after > prompt.began_s and before < until_s
    ]
