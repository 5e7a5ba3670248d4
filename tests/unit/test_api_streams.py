"""Streamed chats and completions, over a generator without a cluster."""

from __future__ import annotations

import pytest

from tests.asking import CHAT, COMPLETIONS, of_choice, stream, text_of
from tests.fake_generator import FakeGenerator


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_adds_up_to_the_whole_answer(path: str) -> None:
    generator = FakeGenerator("naïve 🙂 你好")
    chunks = stream(generator, path, n=2, max_tokens=40)
    for index in range(2):
        assert text_of(of_choice(chunks, index)) == "naïve 🙂 你好"
    assert len({chunk["id"] for chunk in chunks}) == len({chunk["created"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk" if path == CHAT else "text_completion"}


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason() -> None:
    choices = of_choice(stream(FakeGenerator(), CHAT))
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_token_yields_a_chunk_even_without_text(path: str) -> None:
    """An emoji takes several tokens; the end of sequence shows nothing."""
    generator = FakeGenerator("🦄")
    (end,) = generator.text.eos_ids
    expected = [*generator.encode("🦄"), end]
    choices = of_choice(stream(generator, path, return_token_ids=True))
    assert len(expected) > 3
    assert [choice["token_ids"] for choice in choices] == [[], *([token] for token in expected), []]
    assert text_of(choices) == "🦄"


def test_prompt_token_ids_come_with_the_first_chunk() -> None:
    generator = FakeGenerator()
    first, second, *_ = stream(generator, CHAT, return_token_ids=True)
    assert first["prompt_token_ids"] == list(generator.encode("[user]hi\n[assistant]"))
    assert "prompt_token_ids" not in second
    choices = of_choice(stream(generator, COMPLETIONS, prompt=["a", "b"], return_token_ids=True), 1)
    assert choices[0]["prompt_token_ids"] == list(generator.encode("b"))
    assert "prompt_token_ids" not in choices[1]


def test_a_character_cut_off_by_the_limit_is_flushed_with_the_reason() -> None:
    choices = of_choice(stream(FakeGenerator("🦄"), COMPLETIONS, max_tokens=2))
    assert [(choice["text"], choice["finish_reason"]) for choice in choices][-1] == ("\ufffd", "length")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_comes_last_when_asked_for(path: str) -> None:
    *chunks, last = stream(FakeGenerator(), path, stream_options={"include_usage": True}, max_tokens=3)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_streamed_usage_tells_what_was_cached(path: str) -> None:
    generator = FakeGenerator()
    generator.cached = {0: 4}
    *_, last = stream(generator, path, stream_options={"include_usage": True}, stop="wor")
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_usage_is_left_out_otherwise() -> None:
    assert all("usage" not in chunk for chunk in stream(FakeGenerator(), CHAT))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_no_part_of_a_stop_string_is_streamed(path: str) -> None:
    chunks = of_choice(stream(FakeGenerator("hello world"), path, stop=" wor"))
    assert text_of(chunks) == "hello"
    assert chunks[-1]["finish_reason"] == "stop"
