"""The official OpenAI client against the API, over real HTTP on a loopback port."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import openai
import pytest
import uvicorn
from openai.types.chat import ChatCompletionMessageParam

from cluster.errors import AtCapacity, NodeLost
from coordinator.api.app import create_app
from coordinator.generation import Choice
from tests.fake_generator import FakeGenerator

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


class Server:
    """uvicorn in a thread, and a client for it."""

    def __init__(self, generator: FakeGenerator) -> None:
        self.generator = generator
        self.socket = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(generator), log_level="warning", lifespan="on", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=10)

    def __enter__(self) -> Server:
        self.thread.start()
        deadline = time.monotonic() + 10
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.server.started
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()
        assert not self.thread.is_alive()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(FakeGenerator("naïve 🙂 answer")) as server:
        yield server


def test_a_chat(server: Server) -> None:
    answer = server.client.chat.completions.create(model="demo", messages=HI, temperature=0, seed=1, max_tokens=50)
    assert answer.choices[0].message.content == "naïve 🙂 answer"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_an_answer_goes_back_as_history(server: Server) -> None:
    """As people do it: the message object of the answer, with all its empty fields."""
    answer = server.client.chat.completions.create(model="demo", messages=HI)
    again: list[ChatCompletionMessageParam] = [*HI, answer.choices[0].message.model_dump(), *HI]  # type: ignore[list-item]
    assert server.client.chat.completions.create(model="demo", messages=again).choices[0].message.content


def test_a_streamed_chat(server: Server) -> None:
    stream = server.client.chat.completions.create(
        model="demo", messages=HI, n=2, stream=True, stream_options={"include_usage": True}, stop=["answer"]
    )
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    assert texts == {0: "naïve 🙂 ", 1: "naïve 🙂 "}
    assert reasons == {0: "stop", 1: "stop"}
    assert usage is not None
    assert usage.completion_tokens > 2


def test_the_clients_stream_helper_understands_every_event(server: Server) -> None:
    with server.client.chat.completions.stream(model="demo", messages=HI) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "naïve 🙂 answer"


def test_completions_of_text_and_token_ids(server: Server) -> None:
    answer = server.client.completions.create(model="demo", prompt="hi", max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("naïve 🙂 answer", "stop")
    several = server.client.completions.create(model="demo", prompt=[[1, 2], [3]], max_tokens=2)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert {choice.finish_reason for choice in several.choices} == {"length"}


def test_a_streamed_completion(server: Server) -> None:
    stream = server.client.completions.create(model="demo", prompt="hi", stream=True, max_tokens=50)
    assert "".join(chunk.choices[0].text for chunk in stream) == "naïve 🙂 answer"


def test_further_fields_travel_as_extra_body(server: Server) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "min_tokens": 2, "return_token_ids": True}
    answer = server.client.chat.completions.create(model="demo", messages=HI, extra_body=extra)
    ids = (answer.choices[0].model_extra or {})["token_ids"]
    assert answer.usage is not None
    assert len(ids) == answer.usage.completion_tokens
    assert server.generator.requests[0].sampling.top_k == 5


def test_the_model_list(server: Server) -> None:
    (model,) = server.client.models.list()
    assert model.id == "demo"
    assert (model.model_extra or {})["max_model_len"] == 200
    assert server.client.models.retrieve("org/demo").id == "demo"


def test_a_bad_request_names_its_parameter(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(model="demo", messages=HI, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(
            model="demo", messages=HI, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
        )
    assert caught.value.param == "tools"


def test_an_unknown_model_is_not_found(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.chat.completions.create(model="other", messages=HI)
    assert caught.value.code == "model_not_found"


def test_a_full_queue_is_a_rate_limit(server: Server) -> None:
    server.generator.refusal = AtCapacity("full", retry_after_s=1.0)
    with pytest.raises(openai.RateLimitError) as caught:
        server.client.chat.completions.create(model="demo", messages=HI, stream=True)
    assert caught.value.response.headers["retry-after"] == "1"


def test_the_client_comes_back_after_a_full_queue(server: Server) -> None:
    server.generator.refusal = AtCapacity("full", retry_after_s=0.1)
    threading.Timer(0.3, lambda: setattr(server.generator, "refusal", None)).start()
    patient = server.client.with_options(max_retries=3)
    assert patient.chat.completions.create(model="demo", messages=HI).choices[0].message.content


def test_an_error_in_the_middle_of_a_stream_is_raised(server: Server) -> None:
    server.generator.failure, server.generator.failure_after = NodeLost("box is gone"), 3
    seen = []
    with pytest.raises(openai.APIError, match="box is gone"):
        seen.extend(server.client.completions.create(model="demo", prompt="hi", stream=True, max_tokens=50))
    assert len(seen) == 3


def test_closing_a_stream_cancels_the_generation() -> None:
    def forever(choice: Choice) -> tuple[int, ...]:
        return generator.encode("on and on ")

    generator = FakeGenerator(forever, context_tokens=10**9)
    with Server(generator) as server:
        stream = server.client.chat.completions.create(model="demo", messages=HI, stream=True)
        next(iter(stream))
        stream.close()
        deadline = time.monotonic() + 10
        while not generator.finished and time.monotonic() < deadline:
            time.sleep(0.01)
        assert generator.finished == [generator.requests[0].id]


def test_many_requests_at_once_keep_to_themselves() -> None:
    def echo(choice: Choice) -> tuple[int, ...]:
        return choice.prompt

    async def ask(client: openai.AsyncOpenAI, text: str) -> bool:
        stream = await client.completions.create(model="demo", prompt=text, stream=True, max_tokens=100)
        return "".join([chunk.choices[0].text async for chunk in stream]) == text

    async def everybody(url: str) -> list[bool]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=20) as client:
            return list(await asyncio.gather(*(ask(client, f"text number {at}") for at in range(20))))

    with Server(FakeGenerator(echo)) as server:
        assert all(asyncio.run(everybody(server.url)))
