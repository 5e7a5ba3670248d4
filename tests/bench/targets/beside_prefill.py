"""Target 4: a long prompt must not make running answers stutter."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from cluster.cli.bench_client import Answer
from cluster.cli.bench_measures import Load, Spread
from cluster.errors import ClusterError
from tests.bench.arms import Arm
from tests.bench.bench import TWO, Bench
from tests.bench.loads import IN_TOKENS, run_load, whole
from tests.bench.rows import Row, at_most

USERS, PROMPT = 4, 4096
_HEAD_START = 16
"""Tokens that the four have before the prompt comes."""
_OUTPUT_MAX = 1000


def rows(bench: Bench) -> list[Row]:
    arm = bench.arm(TWO)
    alone = run_load([arm], Load(USERS, IN_TOKENS, bench.effort.output_tokens, rounds=1), 1)[arm.name][0]
    quiet_s = asyncio.run(_prompt(arm)).first_s or 0.0
    assert alone.gap is not None and alone.first is not None
    # The answers outlast the prompt, unless it takes three times as long beside them.
    output = min(_OUTPUT_MAX, 2 * _HEAD_START + math.ceil(3 * quiet_s / alone.gap.p50_s))
    prompt, answers = asyncio.run(_beside(arm, output, alone.first.p95_s + _HEAD_START * alone.gap.p50_s))
    gaps = _gaps_during(prompt, answers)
    beside = Spread.of(gaps)
    if beside is None:
        raise ClusterError("the four answers ended before the prompt came")
    return [
        Row(4, f"two nodes: p99 gap beside a prompt of {PROMPT}, to the median gap without",
            beside.p99_s / alone.gap.p50_s, "", 1.0, at_most(2.5), note=f"{len(gaps)} gaps"),
        Row(4, f"two nodes: median gap of {USERS} answers alone", 1000 * alone.gap.p50_s, "ms"),
        Row(4, f"two nodes: p99 gap of {USERS} answers alone", 1000 * alone.gap.p99_s, "ms"),
        Row(4, "two nodes: median gap beside the prompt", 1000 * beside.p50_s, "ms",
            note=f"{beside.p50_s / alone.gap.p50_s:.2f} times as long"),
        Row(4, "two nodes: p99 gap beside the prompt", 1000 * beside.p99_s, "ms"),
        Row(4, "two nodes: the prompt's first token beside them", prompt.first_s, "s", quiet_s,
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
