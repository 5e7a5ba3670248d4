"""Every wrong request gets an error of OpenAI's shape, and no request harms another."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
from starlette.testclient import TestClient

from cluster.errors import AtCapacity, ClusterError, NodeLost, NotReady, PotluckError, RequestError
from cluster.limits import HTTP_BODY_BYTES_MAX
from coordinator.api.app import create_app
from coordinator.api.prompts import WINDOW_CHARS
from coordinator.generation import Ready
from coordinator.text.tokenizer import Tokenizer
from tests.fake_generator import FakeGenerator, text_model
from tests.tiny_tokenizers import byte_level

HI = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def client(generator: FakeGenerator | None = None) -> TestClient:
    return TestClient(create_app(generator or FakeGenerator()), base_url="http://localhost")


def error(response: Any, status: int) -> Any:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_a_wrong_field_is_named() -> None:
    found = error(client().post(CHAT, json={"messages": HI, "temperature": 3}), 400)
    assert (found["type"], found["param"]) == ("invalid_request_error", "temperature")
    assert "from 0 to 2" in found["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"), (b"{", "invalid_json"), (b'{"a": NaN}', "invalid_json"), (b"\xff{}", "invalid_utf8"),
        (b'{"prompt": "\xc3("}', "invalid_utf8"), (b"[" * 100_000, "invalid_json"), (b"1" * 5000, "invalid_json"),
    ],
)  # fmt: skip
def test_a_body_that_is_not_json(body: bytes, code: str) -> None:
    assert error(client().post(COMPLETIONS, content=body), 400)["code"] == code


@pytest.mark.parametrize("body", ["[]", '"x"', "3", "null"])
def test_a_body_that_is_no_object(body: str) -> None:
    assert "JSON object" in error(client().post(CHAT, content=body), 400)["message"]


def test_an_unknown_field_that_no_encoding_holds_is_still_answered() -> None:
    assert error(client().post(COMPLETIONS, content=b'{"prompt": "a", "\\ud800": 1}'), 400)["param"] == "\ud800"


def test_an_announced_body_over_the_limit_is_refused_unread() -> None:
    response = client().post(COMPLETIONS, content=b"x", headers={"Content-Length": str(HTTP_BODY_BYTES_MAX + 1)})
    assert error(response, 413)["code"] == "body_too_large"


def test_a_body_that_grows_over_the_limit_is_refused_while_it_arrives() -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 4 * HTTP_BODY_BYTES_MAX:
            sent += 1 << 20
            yield b" " * (1 << 20)

    assert error(client().post(COMPLETIONS, content=endless()), 413)["code"] == "body_too_large"


def test_an_unknown_model() -> None:
    found = error(client().post(CHAT, json={"messages": HI, "model": "gpt-5"}), 404)
    assert (found["code"], found["param"]) == ("model_not_found", "model")


def test_an_unknown_path_and_a_wrong_method() -> None:
    assert error(client().get("/v2"), 404)["code"] == "not_found"
    response = client().get(CHAT)
    assert error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_no_messages() -> None:
    assert error(client().post(CHAT, json={"messages": []}), 400)["param"] == "messages"


def test_the_templates_own_refusal() -> None:
    found = error(client().post(CHAT, json={"messages": [{"role": "user", "content": "refuse me"}]}), 400)
    assert found["param"] == "messages"
    assert "not this one" in found["message"]


def test_a_model_without_a_chat_template_points_to_completions() -> None:
    generator = FakeGenerator(text=text_model(template=None))
    assert "/v1/completions" in error(client(generator).post(CHAT, json={"messages": HI}), 400)["message"]
    assert client(generator).post(COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_a_prompt_longer_than_the_context() -> None:
    body: dict[str, object] = {"prompt": [[1] * 200]}
    found = error(client().post(COMPLETIONS, json=body), 400)
    assert (found["code"], found["param"]) == ("context_length_exceeded", "prompt")
    found = error(client().post(CHAT, json={"messages": [{"role": "user", "content": "hello " * 300}]}), 400)
    assert (found["code"], found["param"]) == ("context_length_exceeded", "messages")


def test_a_giant_prompt_is_refused_before_all_of_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, counted = FakeGenerator(), []
    count = generator.text.tokenizer.count
    monkeypatch.setattr(generator.text.tokenizer, "encode", None)
    monkeypatch.setattr(generator.text.tokenizer, "count", lambda text: counted.append(text) or count(text))
    giant = "hello " * 500_000
    for path, body in ((COMPLETIONS, {"prompt": giant}), (CHAT, {"messages": [{"role": "user", "content": giant}]})):
        assert error(client(generator).post(path, json=body), 400)["code"] == "context_length_exceeded"
    assert [len(text) for text in counted] == [WINDOW_CHARS] * 2


def test_a_giant_prompt_that_fits_after_all_is_served() -> None:
    """A few long tokens: the count in windows must not refuse what the whole shows to fit."""
    backend = tokenizers.Tokenizer.from_str(byte_level().to_str())
    backend.add_tokens(["x" * 1000])
    generator = FakeGenerator("a", text=replace(text_model(), tokenizer=Tokenizer(backend)))
    assert client(generator).post(COMPLETIONS, json={"prompt": "x" * 100_000}).status_code == 200
    assert len(generator.requests[0].prompts[0]) == 100


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "min_tokens"])
def test_more_tokens_than_the_context_has_left(field: str) -> None:
    found = error(client().post(CHAT, json={"messages": HI, field: 199}), 400)
    assert (found["code"], found["param"]) == ("context_length_exceeded", field)


def test_a_prompt_that_just_fits() -> None:
    """To the token."""
    assert client().post(COMPLETIONS, json={"prompt": [1] * 190, "max_tokens": 10}).status_code == 200
    assert client().post(COMPLETIONS, json={"prompt": [1] * 190, "max_tokens": 11}).status_code == 400


@pytest.mark.parametrize("prompt", ["", [[]], ["a", ""]])
def test_an_empty_prompt(prompt: object) -> None:
    assert error(client().post(COMPLETIONS, json={"prompt": prompt}), 400)["param"] == "prompt"


def test_too_many_choices() -> None:
    assert error(client().post(COMPLETIONS, json={"prompt": ["a"] * 9, "n": 2}), 400)["param"] == "n"
    assert error(client().post(COMPLETIONS, json={"prompt": ["a"] * 17}), 400)["param"] == "prompt"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "retry"),
    [
        (AtCapacity("full", retry_after_s=2.5), 429, "3"), (NotReady("loading"), 503, "5"),
        (NodeLost("box is gone"), 503, None), (RequestError("too long", field="prompt"), 400, None),
    ],
)  # fmt: skip
def test_an_error_before_the_first_token_has_its_status(
    stream: bool, refusal: PotluckError, status: int, retry: str | None
) -> None:
    """Streamed or not."""
    generator = FakeGenerator()
    generator.refusal = refusal
    response = client(generator).post(COMPLETIONS, json={"prompt": "a", "stream": stream})
    assert error(response, status)["message"] == str(refusal)
    assert response.headers.get("retry-after") == retry
    assert len(generator.finished) == 1


def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    generator = FakeGenerator()
    generator.failure, generator.failure_after = NodeLost("box is gone"), 2
    response = client(generator).post(COMPLETIONS, json={"prompt": "a", "stream": True})
    *_, last, rest = response.text.split("\n\n")
    assert rest == ""
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "box is gone"
    assert "[DONE]" not in response.text
    assert len(generator.finished) == 1


def test_an_error_in_the_middle_of_a_whole_answer() -> None:
    generator = FakeGenerator()
    generator.failure, generator.failure_after = ClusterError("lost"), 2
    assert error(client(generator).post(COMPLETIONS, json={"prompt": "a"}), 503)["message"] == "lost"


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_is_answered_and_logged_without_its_message(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its message may hold a prompt, as this one does."""
    generator = FakeGenerator()
    generator.failure, generator.failure_after = ValueError("my secret prompt"), 1
    with caplog.at_level(logging.DEBUG):
        response = client(generator).post(COMPLETIONS, json={"prompt": "my secret prompt", "stream": stream})
    assert response.status_code == (200 if stream else 500)
    assert "internal_error" in response.text
    assert "secret" not in response.text + caplog.text
    assert "ValueError" in caplog.text
    assert "fake_generator.py" in caplog.text


@pytest.mark.parametrize(
    "body", [{"prompt": "my secret"}, {"prompt": "my secret", "x": 1}, {"prompt": ["my secret", 1]}]
)
def test_prompts_never_reach_a_log(body: object, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client().post(COMPLETIONS, json=body)
        client().post(CHAT, json=body)
    assert "secret" not in caplog.text


# -- Before a model is there ---------------------------------------------------------------------------------


def test_without_a_plan_nothing_is_generated_and_the_model_is_listed() -> None:
    generator = FakeGenerator(context_tokens=None)
    response = client(generator).post(CHAT, json={"messages": HI})
    assert error(response, 503)["code"] == "not_ready"
    assert response.headers["retry-after"]
    assert client(generator).get("/v1/models").json()["data"][0]["max_model_len"] is None


def test_without_a_model_the_list_is_empty() -> None:
    generator = FakeGenerator()
    generator.served = None
    assert client(generator).get("/v1/models").json() == {"object": "list", "data": []}
    assert error(client(generator).get("/v1/models/demo"), 404)["code"] == "model_not_found"
    assert client(generator).post(CHAT, json={"messages": HI}).status_code == 503


def test_the_model_is_described_under_its_names() -> None:
    described = {
        "id": "demo", "object": "model", "created": 1_700_000_000, "owned_by": "potluck", "max_model_len": 200,
    }  # fmt: skip
    assert client().get("/v1/models").json() == {"object": "list", "data": [described]}
    assert client().get("/v1/models/demo").json() == described
    assert client().get("/v1/models/org%2Fdemo").json() == described
    assert error(client().get("/v1/models/other"), 404)["code"] == "model_not_found"


def test_health_ready_and_status() -> None:
    generator = FakeGenerator()
    assert client(generator).get("/health").json() == {"status": "ok", "phase": "serving", "reason": None}
    assert client(generator).get("/potluck/status").json() == {"nodes": ["a"]}
    assert client(generator).get("/ready").json() == {"ready": True, "reason": None}
    generator.readiness = Ready(False, "no token came out")
    response = client(generator).get("/ready")
    assert response.status_code == 503
    assert response.json() == {"ready": False, "reason": "no token came out"}
