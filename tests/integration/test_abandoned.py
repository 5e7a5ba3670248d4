"""Answers that nobody waits for any more take no room: not in the queue, not in any stage's cache. What the stages have
of them stays only where nobody needs the room, and every token of that is accounted for."""

from __future__ import annotations

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

pytest.importorskip("torch", reason="the checkpoint is made with transformers: the extra [torch]")

from tests.integration.answers import Served
from tests.integration.live import CONTEXT, USERS, Coordinator, eventually

FREED_S = 3.0
"""Three times what is promised, and nodes tell of their caches every half second."""


def _ask_for(answer_tokens: int, served: Served, **fields: object) -> dict[str, Any]:
    prompt = list(served.asked.prompt)
    return {"prompt": prompt, "max_tokens": answer_tokens, "temperature": 0, "ignore_eos": True, **fields}


def _is_busy(mixed: Coordinator) -> bool:
    return all(node["kv_tokens_used"] > 0 for node in mixed.status()["nodes"])


def test_a_stream_that_is_closed_frees_the_cache_on_every_stage(mixed: Coordinator, served: Served) -> None:
    eventually(mixed.is_free, "nothing is in the cache before")
    with httpx.stream("POST", f"{mixed.url}/v1/completions", json=_ask_for(900, served, stream=True)) as response:
        lines = response.iter_lines()
        eventually(lambda: next(lines).startswith("data: ") and _is_busy(mixed), "every stage holds the sequence")
    eventually(mixed.is_free, "the cache is free again", FREED_S)


@pytest.mark.parametrize(("prompt_tokens", "patience_s"), [(40, 0.5), (900, 0.02), (900, 0.2)])
def test_a_client_that_goes_away_before_its_answer_frees_the_cache(
    prompt_tokens: int, patience_s: float, mixed: Coordinator
) -> None:
    """While its prompt is computed, or its answer is."""
    body = {"prompt": [5] * prompt_tokens, "max_tokens": CONTEXT - prompt_tokens, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{mixed.url}/v1/completions", json=body, timeout=httpx.Timeout(60, read=patience_s))
    eventually(mixed.is_free, "the cache is free again", FREED_S)


def test_a_client_that_goes_away_from_the_queue_leaves_it(mixed: Coordinator, served: Served) -> None:
    """The cache is full of long answers; two requests wait, give up, and the rest follows."""
    full = threading.Barrier(USERS + 1, timeout=60)
    leave = threading.Event()

    def hold(_: int) -> None:
        body = _ask_for(CONTEXT - len(served.asked.prompt), served, stream=True)
        with httpx.stream("POST", f"{mixed.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()  # closes the stream when it is dropped
            next(lines)
            full.wait()
            leave.wait(60)

    def give_up() -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(urlsplit(mixed.url).netloc, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(_ask_for(CONTEXT // 2, served)))
        return connection

    def has(running: int, waiting: int) -> bool:
        load = mixed.status()["load"]
        return (load["running"], load["waiting"]) == (running, waiting)

    with ThreadPoolExecutor(USERS) as threads:
        asking = [threads.submit(hold, number) for number in range(USERS)]
        full.wait()
        with closing(give_up()), closing(give_up()):
            eventually(lambda: has(USERS, 2), "all that fit run, two wait")
        eventually(lambda: has(USERS, 0), "the two have left the queue")
        leave.set()
        for each in asking:
            each.result(60)
    eventually(mixed.is_free, "the cache is free again")
