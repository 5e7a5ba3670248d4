"""A whole endpoint in one process: the coordinator's parts over real engines, without wires, and without speed.

HTTP is spoken to the real application; what the stages compute is counted where engines compute it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import httpx

from cluster.frames import Frame, Outcome
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.placement import sequences_max
from cluster.plan import Fence
from cluster.steps import Boundary, Row, Step
from cluster.types import DeploymentId, Epoch, SequenceId
from coordinator.admission import Room
from coordinator.api.app import create_app
from coordinator.generation import ServedModel
from coordinator.pipeline import Pipeline, TimedOutcome
from coordinator.service import InferenceService
from coordinator.serving import Serving
from coordinator.text.model import load_text_model
from node.engine import Engine
from node.stage import StageRunner
from tests.oracle.pipelines import Compute, load_pipeline, stage_specs, wrap_steps

FENCE = Fence(DeploymentId("d"), Epoch(1))
CONTEXT, USERS = 512, 4


class LocalPipeline:
    """Computes each step when the loop comes to it, stage after stage."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.computed: list[tuple[SequenceId, int]] = []  # rows of the first stage: whose, and how many tokens
        self.kv_bytes: list[int] = []  # on the first stage, after each step
        self.engines = engines
        wrap_steps(engines[0], self._counted)
        self.stages = [
            StageRunner(engine, stage=index, is_last=engine is engines[-1]) for index, engine in enumerate(engines)
        ]
        self._steps: asyncio.Queue[Step] = asyncio.Queue()
        self._under_way = 0
        self.idle = asyncio.Event()

    def _counted(self, compute: Compute) -> Compute:
        def step(rows: Sequence[Row], inputs: Boundary | None) -> object:
            self.computed += [(row.seq, len(row.tokens)) for row in rows]
            return compute(rows, inputs)

        return step

    @property
    def tokens_computed(self) -> int:
        return sum(tokens for _, tokens in self.computed)

    @property
    def tokens_held(self) -> list[int]:
        return [stage.capacity.kv_tokens_used for stage in self.stages]

    def send(self, step: Step) -> None:
        self._steps.put_nowait(step)
        self._under_way += 1
        self.idle.clear()

    async def run(self, on_outcome: Callable[[TimedOutcome], None]) -> None:
        while True:
            step = await self._steps.get()
            passed: Frame | Outcome = Frame(FENCE, step)
            for stage in self.stages:
                assert isinstance(passed, Frame)
                passed = stage.run(passed, receive_s=0.0, queue_s=0.0)
            assert isinstance(passed, Outcome)
            self.kv_bytes.append(self.stages[0].capacity.kv_bytes)
            self._under_way -= 1
            on_outcome(TimedOutcome(passed.result, 0.01, len(step.rows), step.token_count))
            if self._under_way == 0:
                self.idle.set()

    async def close(self) -> None:
        return


class Endpoint:
    """What clients see of it."""

    def __init__(
        self, pipeline: LocalPipeline, serving: Serving, client: httpx.AsyncClient, running: asyncio.Task[None]
    ) -> None:
        self.pipeline, self.serving, self._client, self._running = pipeline, serving, client, running

    async def complete(self, prompt: Sequence[int], max_tokens: int, *, key: str = "", **fields: object) -> Any:
        """The whole answer to token ids, greedily."""
        body = {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, **fields}
        return await self._ask("/v1/completions", body, {"authorization": f"Bearer {key}"} if key else {})

    async def chat(self, *said: str, **fields: object) -> Any:
        """The whole answer to what user and assistant have said in turns."""
        messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
        return await self._ask("/v1/chat/completions", {"messages": messages, "return_token_ids": True, **fields}, {})

    async def _ask(self, path: str, body: Mapping[str, object], headers: Mapping[str, str]) -> Any:
        asking = asyncio.create_task(self._client.post(path, json=body, headers=headers))
        await asyncio.wait((asking, self._running), return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            self._running.result()  # what broke the pipeline
        response = await asking
        assert response.status_code == 200, response.text
        return response.json()


@contextlib.asynccontextmanager
async def endpoint(
    makers: Sequence[Callable[[], Engine]], folder: Path, *, prefix_cache: bool = True, users: int = USERS
) -> AsyncIterator[Endpoint]:
    facts = read_facts(open_checkpoint(folder))
    cuts = deque((cut for cut in sorted(facts.legal_cuts) if 0 < cut <= 3), maxlen=len(makers) - 1)
    specs = stage_specs(folder, tuple(cuts), kv_tokens=users * CONTEXT, context_tokens=CONTEXT)
    pipeline = LocalPipeline(load_pipeline(makers, specs))
    sequences = sequences_max(facts, CONTEXT, users)
    room = Room(len(makers), users * CONTEXT, CONTEXT, sequences, facts.rewind)
    serving = Serving(cast(Pipeline, pipeline), room, prefix_cache=prefix_cache)
    service = InferenceService(dict)
    service.set_model(ServedModel("model", frozenset(), 0, facts.vocab_size, None, load_text_model(folder)))
    service.begin(serving)
    running = asyncio.create_task(serving.run())
    transport = httpx.ASGITransport(app=create_app(service))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
            yield Endpoint(pipeline, serving, client, running)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for stage in pipeline.stages:
            stage.close()
