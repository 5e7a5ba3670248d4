"""What arms are asked, and what came of it: rounds over all arms in turn, so that what else the machine does meets all
alike."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from cluster.cli.bench_client import Answer
from cluster.cli.bench_measures import Load, Result
from cluster.errors import ClusterError
from tests.bench.arms import Arm

T = TypeVar("T")

IN_TOKENS, OUT_TOKENS = 100, 128
"""The load of the targets, where they do not say otherwise."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: a quick table tells whether it works, a full one what is true."""

    rounds: int
    crowd_rounds: int  # of loads with many answers, each of which is many measurements
    pass_seconds: float  # of each stage's passes alone
    output_tokens: int
    coordinator_seconds: float
    quick: bool


FULL = Effort(
    rounds=3, crowd_rounds=2, pass_seconds=2.0, output_tokens=OUT_TOKENS, coordinator_seconds=5.0, quick=False
)
QUICK = Effort(rounds=1, crowd_rounds=1, pass_seconds=0.3, output_tokens=24, coordinator_seconds=1.0, quick=True)


def interleaved(arms: Sequence[Arm], rounds: int, work: Callable[[Arm], Awaitable[T]]) -> Mapping[str, list[T]]:
    """`work` on each arm, `rounds` times over."""
    found: dict[str, list[T]] = {arm.name: [] for arm in arms}

    async def one(arm: Arm) -> T:
        return await work(arm)

    for _ in range(rounds):
        for arm in arms:
            found[arm.name].append(asyncio.run(one(arm)))
    return found


def run_load(arms: Sequence[Arm], load: Load, rounds: int) -> Mapping[str, list[Result]]:
    """A load's results by arm; an error where an answer was not whole."""

    async def work(arm: Arm) -> Result:
        result = await arm.endpoint.run(load)
        if result.problems:
            raise ClusterError(
                f"{len(result.problems)} of {result.requests} answers of {arm.name} failed: {result.problems[0]}"
            )
        return result

    return interleaved(arms, rounds, work)


def whole(answer: Answer) -> Answer:
    if answer.problem or answer.first_s is None:
        raise ClusterError(f"an answer is not whole: {answer.problem or 'it is empty'}")
    return answer


def first_s(answers: Sequence[Answer]) -> float:
    """The median time to the first token."""
    return median(answer.first_s for answer in map(whole, answers) if answer.first_s is not None)


def token_s(results: Sequence[Result]) -> float:
    """A user's median time per token, once tokens come."""
    return 1 / median(result.user_tokens_s for result in results if result.user_tokens_s)


def tokens_s(results: Sequence[Result]) -> float:
    """Tokens a second of all users together."""
    return median(result.tokens_s for result in results)
