"""A prompt's activations travel in eight bits however many are answering, and the answers' own never do."""

from __future__ import annotations

import random

import pytest

from cluster.narrow_frames import may_narrow, narrow_tokens
from cluster.steps import Row, Step, StepDone, StepOutcome
from cluster.types import DType, SequenceId, TensorSpec
from coordinator.admission import Room
from coordinator.narrowing import Narrowing, WireBits
from coordinator.prefix_cache import PrefixCache
from coordinator.scheduler import Scheduler
from tests.simulation.stages import Costs, Stages
from tests.simulation.test_scheduler_promises import asked
from tests.simulation.world import Arrival, World

PROMPT, STAGES, NEWCOMER = 4096, 2, SequenceId(100)
BOUNDARY = (TensorSpec("hidden", (1024,), DType.BF16),)


class Watched(Stages):
    """Lets the links choose for each step, and remembers which rows went in eight bits."""

    def __init__(self, room: Room) -> None:
        super().__init__(room, Costs(), random.Random(1))
        self.links = Narrowing(WireBits.EIGHT, BOUNDARY, STAGES)
        self.narrow: list[Row] = []

    def run(self, step: Step, now: float) -> tuple[float, StepOutcome]:
        at_s, outcome = super().run(step, now)
        narrowing = self.links.choose(step)
        if narrowing:
            self.narrow += [row for row in step.rows if may_narrow(row)]
        assert isinstance(outcome, StepDone)
        self.links.note(outcome.marks, step.token_count, narrow_tokens(step), narrowing)
        return at_s, outcome


@pytest.mark.parametrize("answering", [0, 1, 2, 4])
def test_a_long_prompt_is_narrow_however_many_are_answering(answering: int) -> None:
    room = Room(STAGES, 1 << 20, context_tokens=16_384)
    readers = [asked(number, prompt=20, answer=2000) for number in range(answering)]
    newcomer = asked(int(NEWCOMER), prompt=PROMPT, answer=8)
    stages = Watched(room)
    scheduler = Scheduler(room, prefixes=PrefixCache(room, enabled=False))
    lives = World(scheduler, stages, [*readers, Arrival(5.0, newcomer.ask)]).run()
    assert all(lives[reader.ask.seq].tokens_s[-1] > lives[NEWCOMER].tokens_s[0] for reader in readers), (
        "they read along"
    )
    found = sum(len(row.tokens) for row in stages.narrow if row.seq == NEWCOMER)
    assert PROMPT - 1 <= found <= PROMPT, "all but a chunk of one token"
    lengths = {arrival.ask.seq: len(arrival.ask.prompt) for arrival in (*readers, newcomer)}
    assert all(row.end <= lengths[row.seq] for row in stages.narrow), "an answer's own token was narrow"
    assert [link.narrow_tokens for link in stages.links.links] == [sum(len(row.tokens) for row in stages.narrow)]
