"""What is typed behind `potluck serve` reaches who acts by it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.steps import Sampling
from coordinator.admission import Room
from coordinator.deadlines import SERVER_DEADLINES, Deadlines
from coordinator.events import Event
from coordinator.generation import GenerationRequest
from coordinator.pipeline import Pipeline
from coordinator.scheduler import Scheduler
from coordinator.sequence import SequenceAsk
from coordinator.server import Coordinator
from coordinator.serving import Serving
from tests.unit.test_service import PromptPipeline

REQUEST = GenerationRequest("id", ((5, 6, 7),), Sampling(seed=0, temperature=0.0), 1, 4, 0, False, frozenset())


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> list[SequenceAsk]:
    """What the scheduler of a coordinator on the command line is asked, for one request without wishes of its own."""
    seen: list[SequenceAsk] = []
    submit = Scheduler.submit

    def noted(self: Scheduler, asks: Sequence[SequenceAsk], now: float) -> list[Event]:
        seen.extend(asks)
        return submit(self, asks, now)

    async def run(self: Coordinator, stop: asyncio.Event) -> None:
        serving = Serving(cast(Pipeline, PromptPipeline([5])), Room(1, 64, 64), prefix_cache=False)
        self._service.begin(serving)
        asking = asyncio.ensure_future(anext(self._service.submit(REQUEST)))
        await asyncio.sleep(0)  # it asks at once, and waits for a token
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking

    monkeypatch.setattr(Scheduler, "submit", noted)
    monkeypatch.setattr(Coordinator, "run", run)
    return seen


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), SERVER_DEADLINES),
        (("--queue-timeout", "7"), Deadlines(queue_s=7)),
        (("--first-token-timeout", "7"), Deadlines(first_token_s=7)),
        (("--token-timeout", "7"), Deadlines(between_tokens_s=7)),
        (("--request-timeout", "7"), Deadlines(total_s=7)),
    ],
)
def test_each_timeout_reaches_the_scheduler_as_itself(
    arguments: Sequence[str], expected: Deadlines, scheduled: list[SequenceAsk], tmp_path: Path
) -> None:
    quiet = ("--port", "0", "--no-local-node", "--no-mdns", "--json", "--state", str(tmp_path))
    result = CliRunner().invoke(app, ["serve", "demo", *arguments, *quiet])
    assert result.exit_code == 0, result.output
    assert [ask.deadlines for ask in scheduled] == [expected]
