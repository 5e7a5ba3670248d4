"""The official client against a mixed cluster of three nodes: every way to ask, and what asking leaves behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

pytest.importorskip("torch", reason="the checkpoints are made with transformers: the extra [torch]")

from tests.integration.answers import COUNT, ENDS_AT, Served, continue_greedily
from tests.integration.live import CONTEXT, USERS, Coordinator
from tests.oracle.reference import random_prompt


@pytest.fixture(scope="module")
def client(mixed: Coordinator) -> Iterator[openai.OpenAI]:
    with mixed.client() as made:
        yield made


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    (found,) = client.models.list()
    return found.id


def _say(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def _ids(choice: Any) -> list[int]:
    return list((choice.model_extra or {})["token_ids"])


EXTRA = {"return_token_ids": True, "ignore_eos": True}


# -- Chats -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(served: Served) -> dict[str, list[int]]:
    """Sixteen things to say, each with the token ids of the whole model's decisive answer."""
    found: dict[str, list[int]] = {}
    for number in range(1000):
        said = f"Tell me about number {number}, please."
        ids = continue_greedily(served.whole, served.chat_ids(said), COUNT)
        if ids is not None:
            found[said] = ids
        if len(found) == USERS:
            return found
    raise AssertionError("too few chats have decisive answers")


def test_a_chat_is_the_single_process_answer(
    client: openai.OpenAI, model: str, served: Served, chats: dict[str, list[int]]
) -> None:
    said, ids = next(iter(chats.items()))
    answer = client.chat.completions.create(
        model=model, messages=_say(said), temperature=0, max_completion_tokens=COUNT, extra_body=EXTRA
    )
    assert _ids(answer.choices[0]) == ids
    assert answer.choices[0].message.content == served.text(ids)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(served.chat_ids(said))
    assert answer.usage.completion_tokens == COUNT


def test_every_token_of_a_streamed_chat_is_a_chunk_even_without_text(
    client: openai.OpenAI, model: str, served: Served, chats: dict[str, list[int]]
) -> None:
    said, ids = next(iter(chats.items()))
    chunks = list(
        client.chat.completions.create(
            model=model, messages=_say(said), temperature=0, max_tokens=COUNT, extra_body=EXTRA,
            stream=True, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    choices = [choice for chunk in chunks for choice in chunk.choices]
    with_tokens = [choice for choice in choices if (choice.model_extra or {}).get("token_ids")]
    assert [_ids(choice) for choice in with_tokens] == [[token] for token in ids]
    assert any(not choice.delta.content for choice in with_tokens), "no token without text of its own was drawn"
    assert "".join(choice.delta.content or "" for choice in choices) == served.text(ids)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == COUNT


def test_sixteen_chats_at_once_for_ten_seconds_are_what_each_is_alone(
    mixed: Coordinator, model: str, chats: dict[str, list[int]]
) -> None:
    until = time.monotonic() + 10.0

    def keep_asking(said: str) -> list[list[int]]:
        answers = []
        while time.monotonic() < until or not answers:
            body = {"model": model, "messages": _say(said), "temperature": 0, "max_tokens": COUNT, **EXTRA}
            response = mixed.post("/v1/chat/completions", body)
            assert response.status_code == 200, response.text
            answers.append(response.json()["choices"][0]["token_ids"])
        return answers

    with ThreadPoolExecutor(USERS) as threads:
        answers = list(threads.map(keep_asking, chats))
    assert sum(map(len, answers)) >= 2 * USERS, "hardly anything was computed in ten seconds"
    assert all(answer == ids for ids, given in zip(chats.values(), answers, strict=True) for answer in given)


def test_two_choices_differ_and_come_again_with_the_seed(client: openai.OpenAI, model: str) -> None:
    def ask(n: int) -> list[list[int]]:
        answer = client.chat.completions.create(
            model=model, messages=_say("hello"), seed=7, n=n, max_tokens=20, temperature=1, extra_body=EXTRA
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [_ids(choice) for choice in answer.choices]

    first, second = ask(2)
    assert first != second
    assert ask(2) == [first, second]
    assert ask(1) == [first]


def test_without_a_seed_an_answer_is_another_each_time(client: openai.OpenAI, model: str) -> None:
    def ask() -> list[int]:
        answer = client.chat.completions.create(
            model=model, messages=_say("hello"), max_tokens=20, temperature=1, extra_body=EXTRA
        )
        return _ids(answer.choices[0])

    assert ask() != ask()


# -- Completions -----------------------------------------------------------------------------------------


def test_text_and_its_token_ids_and_lists_of_them_are_continued_alike(
    client: openai.OpenAI, model: str, served: Served
) -> None:
    texts = ["Ada brings warm bread", "every machine holds"]
    prompts = [served.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    expected = [served.text(served.whole.greedy(prompt, 12).ids) for prompt in prompts]

    def ask(prompt: Any) -> list[str]:
        answer = client.completions.create(
            model=model, prompt=prompt, temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    assert ask(texts) == ask(prompts) == expected
    assert ask(texts[0]) == ask(prompts[0]) == expected[:1]


def test_a_streamed_completion_is_the_whole_one(client: openai.OpenAI, model: str, served: Served) -> None:
    stream = client.completions.create(
        model=model, prompt=list(served.asked.prompt), temperature=0, max_tokens=COUNT, stream=True, extra_body=EXTRA
    )
    choices = [choice for chunk in stream for choice in chunk.choices]
    assert [token for choice in choices for token in _ids(choice)] == list(served.asked.ids)
    assert "".join(choice.text for choice in choices) == served.text(served.asked.ids)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_is_never_half_shown(
    stream: bool, client: openai.OpenAI, model: str, served: Served
) -> None:
    text, stop = _stop_across_tokens(served)
    body: Any = {"prompt": list(served.asked.prompt), "temperature": 0, "max_tokens": COUNT, "stop": ["never", stop]}
    answer: Any = client.completions.create(model=model, stream=stream, extra_body={"ignore_eos": True}, **body)
    choices = [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def _stop_across_tokens(served: Served) -> tuple[str, str]:
    """The asked answer's text, and a string in it of which each of two tokens has a part."""
    ids = list(served.asked.ids)
    text = served.text(ids)
    for at in range(4, COUNT):
        before = served.text(ids[:at])
        stop = text[len(before) - 2 : len(before) + 2]
        whole_characters = text.startswith(before) and "\ufffd" not in stop and len(stop) == 4
        if whole_characters and text.index(stop) == len(before) - 2:
            return text, stop
    raise AssertionError(f"no place to cut {text!r}")


def test_an_end_of_sequence_ends_the_answer_and_is_not_shown(mixed: Coordinator, served: Served) -> None:
    found = mixed.complete(served.asked.prompt, max_tokens=COUNT, ignore_eos=False)
    assert found["token_ids"] == list(served.asked.ids[: ENDS_AT + 1])
    assert found["text"] == served.text(served.asked.ids[:ENDS_AT])
    assert found["finish_reason"] == "stop"


def test_ignore_eos_draws_it_and_goes_on(mixed: Coordinator, served: Served) -> None:
    found = mixed.complete(served.asked.prompt, max_tokens=COUNT, ignore_eos=True)
    assert found["token_ids"] == list(served.asked.ids)
    assert served.end in found["token_ids"]
    assert found["finish_reason"] == "length"


def test_min_tokens_keeps_the_end_of_sequence_from_being_drawn(mixed: Coordinator, served: Served) -> None:
    found = mixed.complete(served.asked.prompt, max_tokens=COUNT, min_tokens=ENDS_AT + 8, ignore_eos=False)
    ids = found["token_ids"]
    assert ids[:ENDS_AT] == list(served.asked.ids[:ENDS_AT])
    assert len(ids) >= ENDS_AT + 8
    assert served.end not in ids[: ENDS_AT + 8]


def test_max_tokens_is_obeyed_to_the_token(mixed: Coordinator, served: Served) -> None:
    for count in (1, 2, 9):
        assert mixed.complete(served.asked.prompt, max_tokens=count)["token_ids"] == list(served.asked.ids[:count])


def test_a_prompt_and_its_answer_may_fill_the_context_to_the_last_token(mixed: Coordinator, served: Served) -> None:
    """Its prefill takes several steps; one token more is refused."""
    fits = ((prompt, continue_greedily(served.whole, prompt, 20)) for prompt in map(_long_prompt, range(20)))
    prompt, ids = next((prompt, ids) for prompt, ids in fits if ids is not None)
    assert mixed.complete(prompt, max_tokens=20)["token_ids"] == ids
    assert mixed.post("/v1/completions", {"prompt": prompt, "max_tokens": 21}).status_code == 400


def _long_prompt(seed: int) -> list[int]:
    return random_prompt(CONTEXT - 20, seed)


# -- Models and refusals ---------------------------------------------------------------------------------


def test_the_model_list_tells_the_context(client: openai.OpenAI) -> None:
    (found,) = client.models.list()
    assert (found.model_extra or {})["max_model_len"] == CONTEXT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", True),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
        ("frobnicate", 1),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(
    field: str, value: object, client: openai.OpenAI, model: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=_say("hi"), max_tokens=1, extra_body={field: value})
    assert caught.value.param == field
