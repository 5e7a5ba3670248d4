"""Asks the API over a FakeGenerator, and takes its answers apart."""

from __future__ import annotations

import json
from typing import Any

from starlette.testclient import TestClient

from coordinator.api.app import create_app
from tests.fake_generator import FakeGenerator

HI = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def post(generator: FakeGenerator, path: str, **body: object) -> Any:
    response = TestClient(create_app(generator), base_url="http://localhost").post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def chat(generator: FakeGenerator, **body: object) -> Any:
    return post(generator, CHAT, **{"messages": HI, **body})


def complete(generator: FakeGenerator, **body: object) -> Any:
    return post(generator, COMPLETIONS, **{"prompt": "hi", **body})


def stream(generator: FakeGenerator, path: str, **body: object) -> list[Any]:
    """The chunks of a stream that ends well."""
    body = {"stream": True, "messages" if path == CHAT else "prompt": HI if path == CHAT else "hi", **body}
    response = TestClient(create_app(generator), base_url="http://localhost").post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def of_choice(chunks: list[Any], index: int = 0) -> list[Any]:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def text_of(choices: list[Any]) -> str:
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)
