"""Activations in eight bits: over real streams, and through a cluster of both engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the checkpoints are made with transformers: the extra [torch]")
pytest.importorskip("mlx_lm", reason="one of the nodes needs the extra [mlx]")

from cluster.cli.status import status_lines
from cluster.codec import Decoder, Expectation
from cluster.frames import Frame, Outcome
from cluster.handshake import answer_greeting
from cluster.narrowing import narrow, widen
from cluster.steps import Boundary, Row, Step, StepDone
from cluster.transport import ByteStream, Credentials, create_server, data_service
from cluster.types import DType, SequenceId, StepId, TensorSpec
from node.comparison import to_host
from node.engine import Logits
from node.flow import StageFlow
from node.stage import StageRunner
from tests.integration.answers import Served
from tests.integration.live import Pool, eventually
from tests.oracle.reference import random_prompt
from tests.unit.test_stage import FENCE, CountingEngine
from tests.unit.test_working_ahead import Waiting

WIDTH, TOKENS = 1024, 600
BOUNDARY = (TensorSpec("hidden", (WIDTH,), DType.BF16),)
HIDDEN = to_host(np.random.default_rng(0).standard_normal((TOKENS, WIDTH)).astype(np.float32), DType.BF16)


class Computed(CountingEngine):
    """Hands on the same activations each time; keeps what it was given."""

    def __init__(self, is_last: bool) -> None:
        super().__init__(is_last)
        self.given: list[Boundary | None] = []

    def step(self, rows: Sequence[Row], inputs: Boundary | None) -> Boundary | Logits:
        self.given.append(inputs)
        output = super().step(rows, inputs)
        return output if self.is_last else (HIDDEN,)


class Counted:
    """A stream, and the bytes that came over it."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.write = stream.write
        self.received_bytes = 0

    async def read(self) -> bytes | None:
        message = await self._stream.read()
        self.received_bytes += len(message or b"")
        return message


def _flow(engine: CountingEngine, index: int, thread: ThreadPoolExecutor) -> StageFlow:
    runner = StageRunner(engine, stage=index, is_last=engine.is_last)
    boundary = BOUNDARY if index else ()
    return StageFlow(
        runner, Expectation(FENCE, boundary, 50), stage=index, is_last=engine.is_last, engine_thread=thread
    )


async def _crossing(*narrowing: int, lengths: Sequence[int] = (TOKENS,)) -> tuple[bytes, int]:
    """The activations with which the second of two stages computes, and the bytes that it received."""
    engines, streams = (Computed(False), Computed(True)), []
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        first, last = _flow(engines[0], 0, one), _flow(engines[1], 1, two)

        async def serve(stream: ByteStream) -> None:
            await answer_greeting(stream, FENCE, 1)
            streams.append(Counted(stream))
            await last.receive(streams[-1])

        server = create_server()
        server.add_generic_rpc_handlers((data_service(serve),))
        port = Credentials().bind(server, "127.0.0.1:0")
        await server.start()
        await first.connect_next(Credentials(), f"127.0.0.1:{port}")
        rows = tuple(Row(SequenceId(n), 0, (7,) * length) for n, length in enumerate(lengths))
        step = Step(StepId(1), (), rows)
        results = Waiting()
        delivering = asyncio.create_task(last.deliver(results))
        await first.receive(Waiting(Frame(FENCE, step, narrowing=narrowing)))
        outcome = Decoder(Expectation(FENCE, (), 0)).feed(await asyncio.wait_for(results.outcomes.get(), 30))
        assert isinstance(outcome, Outcome) and isinstance(outcome.result, StepDone), outcome
        delivering.cancel()
        await first.close()
        await server.stop(None)
        await last.close()
    (given,) = engines[1].given
    assert given is not None
    return bytes(given[0].data), streams[0].received_bytes


def test_a_stage_sends_in_eight_bits_where_the_frame_says_so() -> None:
    as_computed, all_bytes = asyncio.run(_crossing())
    assert as_computed == HIDDEN.data
    narrowed, fewer_bytes = asyncio.run(_crossing(0))
    assert narrowed == bytes(widen(narrow(HIDDEN)).data)
    assert fewer_bytes < 0.54 * all_bytes
    beside_answers, bytes_beside = asyncio.run(_crossing(0, lengths=(1, 1, TOKENS - 2)))
    token_bytes = 2 * WIDTH
    assert beside_answers[: 2 * token_bytes] == bytes(HIDDEN.data)[: 2 * token_bytes], "two running answers"
    assert beside_answers[2 * token_bytes :] == narrowed[2 * token_bytes :]
    assert fewer_bytes < bytes_beside < fewer_bytes + 2 * token_bytes
    assert asyncio.run(_crossing(1, 2)) == (as_computed, pytest.approx(all_bytes, abs=50)), "other stages"


def _telling_error(status: dict[str, Any]) -> dict[str, Any] | None:
    return None if status["load"]["links"][0]["narrow_error"] is None else status


NEAR = 0.05
"""Of the spread of the reference's logits: what eight bits may turn into another token."""


@pytest.mark.parametrize("names", [("torch-a", "mlx-a"), ("mlx-a", "torch-a")])
def test_both_engines_answer_alike_with_prompts_in_eight_bits(
    names: tuple[str, str], pool: Pool, served: Served
) -> None:
    with pool.serving(served.folder, names, "--wire-bits", "8") as coordinator:
        prompt = random_prompt(200, 5)
        ids = coordinator.complete(prompt, max_tokens=16, temperature=0, ignore_eos=True)["token_ids"]
        [link] = coordinator.status()["load"]["links"]
        assert link["narrow"] and link["narrow_tokens"] >= 199, "the prompt, but for a chunk of one token"
        status = eventually(lambda: _telling_error(coordinator.status()), "a heartbeat tells the error")
        assert 0.001 < status["load"]["links"][0]["narrow_error"] < 0.02
        sender, receiver = (stage["node"] for stage in status["plan"]["stages"])
        [line] = (line for line in status_lines(status) if line.startswith(f"from {sender} to {receiver}: "))
        assert " tokens of prompts in 8 bits, 0." in line and line.endswith("% off the last time")
    logits = served.whole.logits([*prompt, *ids])[len(prompt) - 1 : -1]
    behind = logits.max(axis=1) - logits[np.arange(len(ids)), ids]
    assert behind.max() <= NEAR * np.ptp(logits, axis=1).min()
