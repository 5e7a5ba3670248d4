"""More at once than the caches hold: everybody gets the answer that they would have got alone."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest

pytest.importorskip("torch", reason="the checkpoint is made with transformers: the extra [torch]")

from cluster.cli.child import Process
from coordinator.promises import ANSWERS_BELIEVED
from tests.integration.answers import Served, questions
from tests.integration.live import Coordinator, Pool, eventually, has_backend

CONTEXT, USERS = 256, 2
"""So that four answers of full length take twice the room that there is."""

OPEN_ENDED: tuple[Mapping[str, object], ...] = (
    {"temperature": 0},
    {"seed": 11, "temperature": 1.0},
    {"seed": 12, "temperature": 0.8, "top_k": 40, "priority": "batch"},
    {"seed": 13, "temperature": 1.2, "top_p": 0.9, "service_tier": "flex"},
)


@pytest.fixture(scope="module")
def narrow(served: Served, pool: Pool) -> Iterator[Coordinator]:
    names = ("torch-a", "mlx-a") if has_backend("mlx") else ("torch-a", "torch-b")
    with pool.serving(served.folder, names, context=CONTEXT, users=USERS) as made:
        yield made


def _chat(narrow: Coordinator, said: str, **fields: object) -> list[int]:
    """An answer that goes on until the context is full."""
    body = {"messages": [{"role": "user", "content": said}], "ignore_eos": True, "return_token_ids": True, **fields}
    response = narrow.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


def _said_of(served: Served, tokens: int) -> str:
    """Words that make a chat's prompt so long, or a little shorter."""
    texts = ("well " * count for count in itertools.count())
    return max(itertools.takewhile(lambda text: len(served.chat_ids(text)) <= tokens, texts), key=len)


def test_answers_that_had_to_begin_again_are_what_they_are_alone(narrow: Coordinator, served: Served) -> None:
    """Greedy and sampled, in both lanes, with and without a length; some outgrow the room that was promised."""
    nearly_full = _said_of(served, CONTEXT - 8)
    for _ in range(ANSWERS_BELIEVED):
        assert len(_chat(narrow, nearly_full)) < 24, "short answers, so that little is promised to the next ones"
    chats = {f"hello {number}": fields for number, fields in enumerate(OPEN_ENDED)}
    # With a length, which teaches nothing about answers without one.
    alone = [
        _chat(narrow, said, max_tokens=CONTEXT - len(served.chat_ids(said)), **fields) for said, fields in chats.items()
    ]
    asked = questions(served.whole)
    before = narrow.status()["load"]["restarts"]
    with ThreadPoolExecutor(len(chats) + len(asked)) as threads:
        together = [threads.submit(_chat, narrow, said, **fields) for said, fields in chats.items()]
        lanes = itertools.cycle(["interactive", "batch"])
        others = [
            threads.submit(narrow.complete, each.prompt, **each.fields(), priority=lane)
            for each, lane in zip(asked, lanes, strict=False)
        ]
        assert [chat.result() for chat in together] == alone
        assert [other.result()["token_ids"] for other in others] == [list(each.ids) for each in asked]
    assert narrow.status()["load"]["restarts"] > before, "nobody had to give room back"


def _lines(response: httpx.Response) -> list[Any]:
    events = (line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: "))
    return [event if event == "[DONE]" else json.loads(event) for event in events]


LONG = {"prompt": [5] * 10, "max_tokens": CONTEXT - 10, "ignore_eos": True}


def test_a_timeout_ends_an_answer_that_is_not_streamed_with_408(narrow: Coordinator) -> None:
    response = narrow.post("/v1/completions", {**LONG, "timeout": 0.05})
    assert response.status_code == 408
    assert response.headers["x-should-retry"] == "false"
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("total_timeout", "timeout")
    eventually(narrow.is_free, "its room is free again")


def test_a_timeout_in_a_stream_is_an_event_and_no_done_follows(narrow: Coordinator) -> None:
    began = time.monotonic()
    narrow.complete(LONG["prompt"], max_tokens=40)  # type: ignore[arg-type]
    timeout_s = time.monotonic() - began  # by then some of 246 tokens have come, and not all
    events = _lines(narrow.post("/v1/completions", {**LONG, "timeout": timeout_s, "stream": True}))
    assert events[-1]["error"]["code"] == "total_timeout"
    assert "choices" in events[0]
    eventually(narrow.is_free, "its room is free again")


def test_who_waits_too_long_for_room_is_told_so(served: Served, pool: Pool) -> None:
    """The server's own limit: 504. On a node that the other coordinator here does not hold."""
    with (
        pool.serving(served.folder, ("torch-c",), "--queue-timeout", "0.3", context=1024, users=1) as coordinator,
        httpx.stream(
            "POST",
            f"{coordinator.url}/v1/completions",
            json={"prompt": [5], "max_tokens": 1023, "ignore_eos": True, "stream": True},
            timeout=60,
        ) as response,
        closing(response.iter_lines()) as lines,
    ):
        next(lines)
        refusal = coordinator.post("/v1/completions", {"prompt": [5], "max_tokens": 1023})
        assert refusal.status_code == 504, refusal.text
        assert refusal.json()["error"]["code"] == "queue_timeout"


@contextmanager
def frozen(node: Process) -> Iterator[None]:
    os.kill(node.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(node.pid, signal.SIGCONT)


def test_a_token_that_does_not_come_is_awaited_as_long_as_the_server_says(served: Served, pool: Pool) -> None:
    """Its node is frozen for a moment, too short to count as lost."""
    asked = {"prompt": [5], "max_tokens": 1023, "ignore_eos": True, "stream": True}
    with (
        pool.serving(served.folder, ("torch-c",), "--token-timeout", "0.3", context=1024, users=1) as coordinator,
        httpx.stream("POST", f"{coordinator.url}/v1/completions", json=asked, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        with frozen(pool.processes["torch-c"]):
            said = [line for line in lines if line]
        assert json.loads(said[-1].removeprefix("data: "))["error"]["code"] == "token_timeout"
        eventually(coordinator.is_free, "its room is free again")
