"""Target 5: the second turn of a chat does not read its history again."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from cluster.cli.bench_client import Answer
from tests.bench.arms import Arm
from tests.bench.bench import ONE, TWO, Bench
from tests.bench.loads import interleaved, whole
from tests.bench.model import HYBRID
from tests.bench.rows import Row, at_most

HISTORY, ANSWER, QUESTION = 2000, 8, 30  # words of the answer cost more tokens when they come back as text


def rows(bench: Bench) -> list[Row]:
    arms = [bench.arm(name) for name in (ONE, TWO)]
    promise = at_most(0.30 if bench.form.shape == HYBRID else 0.15)
    found = []
    for name, turns in interleaved(arms, bench.effort.rounds, _chat).items():
        firsts, seconds = ([answers[turn] for answers in turns] for turn in (0, 1))
        first_s, second_s = _median_first(firsts), _median_first(seconds)
        cached = median(answer.cached_tokens for answer in seconds)
        prompt = median(answer.prompt_tokens for answer in seconds)
        best = (prompt - HISTORY) / HISTORY  # what must be read anew, if nothing else took time
        found += [
            Row(5, f"{name}: first token of the second turn, to the first turn's", second_s / first_s, "", best,
                promise, note=f"{cached:.0f} of {prompt:.0f} prompt tokens cached"),
            Row(5, f"{name}: first token of the first turn", first_s, "s"),
            Row(5, f"{name}: first token of the second turn", second_s, "s"),
        ]  # fmt: skip
    return found


async def _chat(arm: Arm) -> Sequence[Answer]:
    history = list(arm.endpoint.prompt(HISTORY))
    first = whole(await arm.endpoint.ask(history, ANSWER))
    history += [{"role": "assistant", "content": first.text}, *arm.endpoint.prompt(QUESTION)]
    return first, whole(await arm.endpoint.ask(history, ANSWER))


def _median_first(answers: Sequence[Answer]) -> float:
    return median(answer.first_s for answer in answers if answer.first_s is not None)
