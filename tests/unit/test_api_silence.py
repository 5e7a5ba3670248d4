"""Streams in which nothing happens: they begin, they carry comments, and they still end as they should."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import httpx
import pytest

from cluster.errors import ClusterError
from coordinator.api import responding
from coordinator.api.app import create_app
from coordinator.generation import GenerationEvent, GenerationRequest
from tests.fake_generator import FakeGenerator

SILENCE_S = 0.05


class SlowGenerator(FakeGenerator):
    """Takes its time before the first event."""

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        await asyncio.sleep(5 * SILENCE_S)
        async for event in super().submit(request):
            yield event


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responding, "SILENCE_MAX_S", SILENCE_S)


def lines(generator: FakeGenerator, *, stream: bool = True) -> tuple[int, list[str]]:
    """The answer's status, and its lines."""

    async def scenario() -> tuple[int, list[str]]:
        transport = httpx.ASGITransport(app=create_app(generator))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
            answer = await client.post("/v1/chat/completions", json=body)
            return answer.status_code, [line for line in answer.text.splitlines() if line]

    return asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_stream_begins_without_its_first_token_and_says_why_it_waits() -> None:
    generator = SlowGenerator()
    generator.reason = "waiting for\none more node"
    status, found = lines(generator)
    assert status == 200
    assert json.loads(found[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
    assert found[1] == ": waiting for one more node"
    assert found.count(found[1]) < 8, "one for each silence, no more"
    said = [json.loads(line.removeprefix("data: ")) for line in found if line.startswith("data: {")]
    assert "".join(each["choices"][0]["delta"].get("content") or "" for each in said) == "hello world"
    assert found[-1] == "data: [DONE]"


def test_what_goes_wrong_after_that_is_an_event() -> None:
    generator = SlowGenerator()
    generator.refusal = ClusterError("the machine is gone")
    status, found = lines(generator)
    assert status == 200
    assert json.loads(found[-1].removeprefix("data: "))["error"]["message"] == "the machine is gone"
    assert not any("[DONE]" in line for line in found)


def test_an_error_that_comes_soon_still_has_a_status() -> None:
    generator = FakeGenerator()
    generator.refusal = ClusterError("the machine is gone")
    assert lines(generator)[0] >= 500


def test_a_stream_that_flows_has_no_comments() -> None:
    assert not any(line.startswith(":") for line in lines(FakeGenerator())[1])


def test_an_answer_that_is_not_streamed_waits_for_its_end() -> None:
    status, found = lines(SlowGenerator(), stream=False)
    assert status == 200 and json.loads(found[0])["choices"][0]["message"]["content"] == "hello world"
