"""A chat's next turn through the API: whose answers are remembered, for whom, and how long a prompt they may make."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from coordinator.api.app import create_app
from coordinator.text.histories import Histories
from tests.fake_generator import FakeGenerator, text_model
from tests.tiny_tokenizers import END
from tests.unit.test_text_histories import ANSWER, TOKENIZER, canonical, kept, spelt

TEMPLATE = "{% for m in messages %}" + END + "{{ m.role }}: {{ m.content }}{% endfor %}" + END + "assistant: "


def rendered(messages: list[dict[str, str]]) -> str:
    template = text_model(TEMPLATE).template
    assert template is not None
    return template.render(messages)


def test_the_next_turn_of_a_chat_holds_the_tokens_of_the_answer_before() -> None:
    generator = FakeGenerator(lambda choice: spelt(ANSWER), text=text_model(TEMPLATE))
    client = TestClient(create_app(generator), base_url="http://localhost")

    def ask(messages: list[dict[str, str]], **fields: object) -> Any:
        body = {"messages": messages, "return_token_ids": True, **fields}
        return client.post("/v1/chat/completions", json=body).json()

    messages = [{"role": "user", "content": "hi"}]
    first = ask(messages)
    said = first["choices"][0]["message"]["content"]
    assert said == ANSWER
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "and?"}]
    second = ask(messages)
    before = (*first["prompt_token_ids"], *spelt(ANSWER))
    assert tuple(second["prompt_token_ids"][: len(before)]) == before
    assert second["usage"]["prompt_tokens"] == len(second["prompt_token_ids"])
    assert TOKENIZER.decode(second["prompt_token_ids"]) == TOKENIZER.decode(canonical(rendered(messages)))


def test_an_answer_that_a_stop_string_cut_short_is_encoded_anew() -> None:
    generator = FakeGenerator(lambda choice: spelt(ANSWER), text=text_model(TEMPLATE))
    client = TestClient(create_app(generator), base_url="http://localhost")
    messages = [{"role": "user", "content": "hi"}]
    client.post("/v1/chat/completions", json={"messages": messages, "stop": "rld"})
    messages += [{"role": "assistant", "content": "hello wo"}, {"role": "user", "content": "and?"}]
    client.post("/v1/chat/completions", json={"messages": messages})
    assert generator.requests[1].prompts == (canonical(rendered(messages)),)


def test_a_chat_whose_text_fits_the_context_is_answered() -> None:
    """Although its drawn tokens, with the answer asked for, would not."""
    generator = FakeGenerator(lambda choice: spelt(ANSWER), text=text_model(TEMPLATE))
    client = TestClient(create_app(generator), base_url="http://localhost")
    messages = [{"role": "user", "content": "hi"}]
    client.post("/v1/chat/completions", json={"messages": messages})
    messages += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": "and?"}]
    short = canonical(rendered(messages))
    for asked in ({"max_tokens": 200 - len(short)}, {"min_tokens": 200 - len(short)}):
        response = client.post("/v1/chat/completions", json={"messages": messages, **asked})
        assert response.status_code == 200, response.text
        assert generator.requests[-1].prompts == (short,)


@pytest.mark.parametrize(
    ("host", "headers", "fields", "shared"),
    [
        ("10.0.0.1", {}, {}, True),
        ("10.0.0.2", {}, {}, False),
        ("10.0.0.1", {"Authorization": "Bearer other"}, {}, False),
        ("10.0.0.1", {}, {"priority": "batch"}, True),
    ],
)
def test_what_was_said_to_one_client_is_remembered_for_that_one(
    host: str, headers: dict[str, str], fields: dict[str, object], shared: bool
) -> None:
    generator = FakeGenerator(lambda choice: spelt(ANSWER), text=text_model(TEMPLATE))
    app = create_app(generator)
    messages = [{"role": "user", "content": "hi"}]
    first = TestClient(app, base_url="http://localhost", client=("10.0.0.1", 1))
    first.post("/v1/chat/completions", json={"messages": messages})
    messages += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": "and?"}]
    second = TestClient(app, base_url="http://localhost", client=(host, 2), headers=headers)
    second.post("/v1/chat/completions", json={"messages": messages, **fields})
    assert (generator.requests[1].prompts != (canonical(rendered(messages)),)) == shared


@pytest.mark.parametrize(("fields", "turns"), [({}, 1), ({"n": 4}, 1), ({"priority": "batch"}, 0)])
def test_the_first_choice_of_who_is_waiting_is_remembered(fields: dict[str, object], turns: int) -> None:
    histories = Histories()
    generator = FakeGenerator(lambda choice: (*spelt(ANSWER), *spelt("s" * choice.index)), text=text_model(TEMPLATE))
    client = TestClient(create_app(generator, histories=histories), base_url="http://localhost")
    messages = [{"role": "user", "content": "hi"}]
    client.post("/v1/chat/completions", json={"messages": messages, **fields})
    assert kept(histories) == [rendered(messages) + ANSWER] * turns
