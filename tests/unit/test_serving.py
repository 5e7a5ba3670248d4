"""coordinator/serving.py: what comes first, the next step or whoever waits for tokens?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from cluster.steps import Drawn, Step, StepDone
from coordinator.admission import Room
from coordinator.events import TokenDrawn
from coordinator.pipeline import Pipeline, TimedOutcome
from coordinator.serving import Serving
from tests.unit.test_scheduler import ask


class LoggingPipeline:
    """Answers each step at once."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self._steps: asyncio.Queue[Step] = asyncio.Queue()

    def send(self, step: Step) -> None:
        if step.rows:
            self._log.append("step")
        self._steps.put_nowait(step)

    async def run(self, on_outcome: Callable[[TimedOutcome], None]) -> None:
        while True:
            step = await self._steps.get()
            drawn = tuple(Drawn(row.seq, row.end, 50) for row in step.rows if row.draw is not None)
            on_outcome(TimedOutcome(StepDone(step.id, drawn, (), ()), 0.001, len(step.rows), step.token_count))

    async def close(self) -> None:
        return


def test_the_next_step_is_on_its_way_before_anybody_hears_of_the_last_one() -> None:
    """So that making text of tokens, and writing it, never holds up a stage."""
    log: list[str] = []

    async def scenario() -> None:
        ended = asyncio.Event()
        serving = Serving(cast(Pipeline, LoggingPipeline(log)), Room(1, 1000, 500), prefix_cache=False)

        def listen(event: object) -> None:
            log.append("token") if isinstance(event, TokenDrawn) else ended.set()

        running = asyncio.create_task(serving.run())
        serving.submit([ask(1, max_tokens=3)], listen)
        async with asyncio.timeout(30):
            await ended.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())
    assert log == ["step", "step", "token", "step", "token", "token"]
