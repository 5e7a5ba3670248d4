"""One endpoint under test: what it understands, what a word costs there, and a load's answers from it.

Owns the questions that one endpoint is asked. Knows nothing of other endpoints, tables or options.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence

from cluster.cli.bench_client import Answer, Target, ask
from cluster.cli.bench_measures import Load, Result, inside, measure
from cluster.cli.bench_prompts import LONG_WORDS, SHORT_WORDS, UNKNOWN, TokenCost, text_of
from cluster.cli.endpoint import Endpoint
from cluster.errors import ClusterError, PotluckError

Messages = Sequence[Mapping[str, str]]


class BenchedEndpoint:
    """Prompts are random words from a seed, so no cache has seen them; answers last as long as asked, where the
    endpoint can be told to ignore the model's end of sequence."""

    def __init__(self, target: Target, *, seed: int, timeout_s: float) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._rng = random.Random(seed)  # noqa: S311 - words, not secrets
        self._cost = UNKNOWN
        self._extra: Mapping[str, object] = {}

    async def prepare(self) -> None:
        """Find out whether answers can be made to last, and what a word costs. Warms the endpoint up as well."""
        answer = await self.ask(self._words(SHORT_WORDS), 4, {"ignore_eos": True})
        if not answer.problem:
            self._extra = {"ignore_eos": True}
        else:  # not everybody's field: then an answer ends when the model ends it
            answer = await self.ask(self._words(SHORT_WORDS), 4, {})
            if answer.problem:
                raise ClusterError(f"{self.target.name} does not answer: {answer.problem}")
        longer = await self.ask(self._words(LONG_WORDS), 1)
        self._cost = TokenCost.from_counts(answer.prompt_tokens, longer.prompt_tokens) or UNKNOWN

    async def run(self, load: Load) -> Result:
        """What the endpoint makes of a load."""
        before = self.status()

        async def user() -> list[Answer]:
            return [await self.ask(self.prompt(load.prompt_tokens), load.output_tokens) for _ in range(load.rounds)]

        answers = [answer for each in await asyncio.gather(*(user() for _ in range(load.users))) for answer in each]
        result = measure(self.target.name, load, answers, None)
        return measure(self.target.name, load, answers, inside(before, self.status(), result.wall_s))

    def prompt(self, tokens: int) -> Messages:
        """A question of about so many tokens that nobody has asked before."""
        return self._words(self._cost.words_for(tokens))

    async def ask(self, messages: Messages, output_tokens: int, extra: Mapping[str, object] | None = None) -> Answer:
        """One streamed greedy answer; `extra` in place of the fields that were found to be understood."""
        fields = self._extra if extra is None else extra
        body = {"messages": messages, "max_tokens": output_tokens, "temperature": 0, **fields}
        return await ask(self.target, body, self._timeout_s)

    def status(self) -> Mapping[str, object] | None:
        """What a Potluck endpoint tells of itself; None from others."""
        try:
            return Endpoint(self.target.url.geturl(), timeout_s=10.0).get("/potluck/status")
        except PotluckError:
            return None

    def _words(self, words: int) -> Messages:
        return [{"role": "user", "content": text_of(words, self._rng)}]
