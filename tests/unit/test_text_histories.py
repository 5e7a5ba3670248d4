"""coordinator/text/histories.py: a chat that goes on word for word is encoded with the tokens that were drawn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from coordinator.api.app import create_app
from coordinator.text.histories import Histories
from coordinator.text.tokenizer import Tokenizer
from tests.fake_generator import FakeGenerator, text_model
from tests.tiny_tokenizers import END, byte_fallback, byte_level

TOKENIZER = Tokenizer(byte_level())
EOS = TOKENIZER.id_of(END)
assert EOS is not None
EOS_IDS = frozenset({EOS})
ASKED, ANSWER, NEXT = f"{END}user: hello{END}assistant:", "hello world", f"{END}user: and the words?{END}assistant:"


def canonical(text: str) -> tuple[int, ...]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def spelt(text: str) -> tuple[int, ...]:
    """A token for each byte: what a model might draw, and no encoder would."""
    return tuple(id for byte in text.encode() for id in canonical_byte(byte))


def canonical_byte(byte: int) -> tuple[int, ...]:
    (id,) = (id for id in range(300) if TOKENIZER.piece(id) == bytes([byte]))
    return (id,)


def answered(histories: Histories, tokens: tuple[int, ...], *, salt: str = "", asked: str = ASKED) -> tuple[int, ...]:
    """A turn; returns its prompt."""
    turn = histories.begin(TOKENIZER, salt, asked)
    turn.answered(tokens, EOS_IDS)
    return turn.ids


def ids_of(histories: Histories, text: str, salt: str = "") -> tuple[int, ...]:
    return histories.begin(TOKENIZER, salt, text).ids


def test_a_chat_that_goes_on_is_read_as_it_was_said() -> None:
    histories = Histories()
    assert answered(histories, (*spelt(ANSWER), *EOS_IDS)) == canonical(ASKED)
    assert ids_of(histories, ASKED + ANSWER + NEXT) == (*canonical(ASKED), *spelt(ANSWER), *canonical(NEXT))
    assert ids_of(histories, ASKED) == canonical(ASKED)


def test_so_is_every_turn_after_it() -> None:
    histories, text, expected = Histories(), ASKED, canonical(ASKED)
    for _ in range(3):
        assert answered(histories, spelt(ANSWER), asked=text) == expected
        text, expected = text + ANSWER + NEXT, (*expected, *spelt(ANSWER), *canonical(NEXT))


@pytest.mark.parametrize(
    "text",
    [
        ASKED + "hello worlds" + NEXT,  # the answer was edited
        ASKED.replace("hello", "Hello") + ANSWER + NEXT,  # the question was
        ASKED + ANSWER + " and more" + NEXT,  # nothing separates what follows
        ASKED + ANSWER,
    ],
)
def test_a_chat_that_goes_on_otherwise_is_encoded_anew(text: str) -> None:
    histories = Histories()
    answered(histories, spelt(ANSWER))
    assert ids_of(histories, text) == canonical(text)


def test_another_key_shares_nothing() -> None:
    histories = Histories()
    answered(histories, spelt(ANSWER), salt="mine")
    assert ids_of(histories, ASKED + ANSWER + NEXT, salt="yours") == canonical(ASKED + ANSWER + NEXT)


@pytest.mark.parametrize(
    "tokens",
    [
        (*EOS_IDS, *spelt(ANSWER)),  # an end of sequence in the middle shows no text
        (*spelt(ANSWER), 10_000),  # so does a token that means nothing
        spelt("🙂")[:2],  # half a character
        tuple(EOS_IDS),
        (),
    ],
)
def test_tokens_that_show_less_than_they_are_are_forgotten(tokens: tuple[int, ...]) -> None:
    histories = Histories()
    answered(histories, tokens)
    assert not histories._ids


def test_a_leading_space_that_is_not_shown_is_no_part_of_the_text() -> None:
    """As in Llama 2: the answer's first token stands for a space that its reader never sees."""
    tokenizer = Tokenizer(byte_fallback())
    asked, histories = "<s>", Histories()
    the = tokenizer.id_of("▁the")
    assert the is not None
    histories.begin(tokenizer, "", asked).answered([the], ())
    assert histories.begin(tokenizer, "", asked + "the</s>").ids == tokenizer.encode(
        asked + "the</s>", add_special_tokens=False
    )


def test_the_least_recently_used_are_forgotten_first() -> None:
    histories = Histories(histories_max=2)
    texts = [f"{END}user {number}{END}" for number in range(3)]
    for text in texts[:2]:
        answered(histories, spelt(ANSWER), asked=text)
    assert len(ids_of(histories, texts[0] + ANSWER + NEXT)) > len(canonical(texts[0] + ANSWER + NEXT)), "it is used"
    answered(histories, spelt(ANSWER), asked=texts[2])
    assert [said for _, said in histories._ids] == [texts[0] + ANSWER, texts[2] + ANSWER]


def test_long_histories_are_bounded_together() -> None:
    histories = Histories(chars_max=100)
    for number in range(20):
        answered(histories, spelt(ANSWER), asked=f"{END}user {number}{END}")
        assert histories._chars == sum(len(said) for _, said in histories._ids) <= 100
    answered(histories, spelt("hello" * 100))
    assert (histories._chars, len(histories._ids)) == (0, 0)


def test_nothing_is_kept_where_nothing_may_be() -> None:
    histories = Histories(histories_max=0)
    answered(histories, spelt(ANSWER))
    assert ids_of(histories, ASKED + ANSWER + NEXT) == canonical(ASKED + ANSWER + NEXT)


@given(st.lists(st.integers(0, 365), max_size=30), st.text(max_size=20))
def test_whatever_is_drawn_the_prompt_says_what_the_chat_says(drawn: list[int], more: str) -> None:
    histories = Histories()
    turn = histories.begin(TOKENIZER, "", ASKED)
    turn.answered(drawn, EOS_IDS)
    said = TOKENIZER.decode(drawn)
    text = f"{ASKED}{said}{END}{more}"
    prompt = ids_of(histories, text)
    assert TOKENIZER.decode(prompt) == TOKENIZER.decode(canonical(text))
    assert prompt.count(EOS) == text.count(END)


# -- Through the API -----------------------------------------------------------------------------------------

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
