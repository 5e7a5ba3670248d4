"""The coordinator's path of a token and nothing else: HTTP server, API, scheduler and pipeline of a real coordinator,
with the built-in model's tokenizer, in front of stages that are there already. No discovery, no placement, no loading.

A process of its own: `python -m tests.bench.bare_coordinator FIRST_PORT LAST_PORT STAGES IN_FLIGHT` prints its HTTP
port and serves until it is killed. `/potluck/status` tells how many steps there were, how long the stages' engine
threads have been busy with them, and what is waiting and running.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping

from cluster.cli.running import run_async
from cluster.transport import Credentials
from coordinator.admission import Room
from coordinator.api.app import create_app
from coordinator.builtin import demo_model_path
from coordinator.generation import ServedModel
from coordinator.http import listen, serve_http
from coordinator.narrowing import Narrowing, WireBits
from coordinator.pipeline import Pipeline
from coordinator.service import InferenceService
from coordinator.serving import Serving
from coordinator.text.model import load_text_model
from tests.bench.instant_stage import FENCE, VOCABULARY

_CONTEXT_TOKENS = 100_000


async def _main(first_port: int, last_port: int, stages: int, in_flight: int) -> None:
    service = InferenceService(lambda: _status(serving))
    text = load_text_model(demo_model_path())
    service.set_model(ServedModel("bench", frozenset(), int(time.time()), VOCABULARY, None, text))
    first, last = f"127.0.0.1:{first_port}", f"127.0.0.1:{last_port}"
    narrowing = Narrowing(WireBits.AS_COMPUTED, (), stages)
    pipeline = await Pipeline.connect(Credentials(), FENCE, first, last, stages - 1, narrowing)
    serving = Serving(pipeline, Room(in_flight, 256 * _CONTEXT_TOKENS, _CONTEXT_TOKENS))
    running = asyncio.create_task(serving.run())
    service.begin(serving)
    listener = listen("127.0.0.1", 0)
    listener.listen()
    print(listener.getsockname()[1], flush=True)  # noqa: T201 - whoever started this process waits for it
    await serve_http(create_app(service), listener, asyncio.Event())
    running.cancel()


def _status(serving: Serving) -> Mapping[str, object]:
    told = serving.telemetry
    return {"steps": told.steps, "compute_s": sum(told.stages_busy_s), "load": serving.load}


if __name__ == "__main__":
    run_async(_main(*map(int, sys.argv[1:])))
