"""coordinator/text/histories.py: a chat that goes on word for word is encoded with the tokens that were drawn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.text.histories import Histories
from coordinator.text.tokenizer import Tokenizer
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


def answered(histories: Histories, tokens: tuple[int, ...], *, client: str = "", asked: str = ASKED) -> tuple[int, ...]:
    """A turn; returns its prompt."""
    turn = histories.begin(TOKENIZER, client, asked, 10_000)
    turn.answered(tokens, EOS_IDS)
    return turn.ids


def ids_of(histories: Histories, text: str, client: str = "", tokens_max: int = 10_000) -> tuple[int, ...]:
    return histories.begin(TOKENIZER, client, text, tokens_max).ids


def kept(histories: Histories) -> list[str]:
    return [turn.text for turn in histories._all.turns]


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


def test_another_client_shares_nothing() -> None:
    histories = Histories()
    answered(histories, spelt(ANSWER), client="mine")
    assert ids_of(histories, ASKED + ANSWER + NEXT, client="yours") == canonical(ASKED + ANSWER + NEXT)


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
    assert kept(histories) == []


def test_a_leading_space_that_is_not_shown_is_no_part_of_the_text() -> None:
    """As in Llama 2: the answer's first token stands for a space that its reader never sees."""
    tokenizer = Tokenizer(byte_fallback())
    asked, histories = "<s>", Histories()
    the = tokenizer.id_of("▁the")
    assert the is not None
    histories.begin(tokenizer, "", asked, 10_000).answered([the], ())
    assert histories.begin(tokenizer, "", asked + "the</s>", 10_000).ids == tokenizer.encode(
        asked + "the</s>", add_special_tokens=False
    )


CHATS = [f"{END}user {number}{END}" for number in range(8)]


def goes_on(histories: Histories, text: str, client: str = "") -> bool:
    """A chat with this answer is read as it was said."""
    return ids_of(histories, text + ANSWER + NEXT, client) != canonical(text + ANSWER + NEXT)


def test_a_chat_may_go_on_from_each_of_its_turns() -> None:
    """As who edits a question or asks for an answer again does."""
    histories, turns = Histories(), [ASKED]
    for _ in range(3):
        answered(histories, spelt(ANSWER), asked=turns[-1])
        turns.append(turns[-1] + ANSWER + NEXT)
    for text in turns[1:]:
        branch = text.removesuffix(NEXT) + f"{END}user: else{END}assistant:"
        prompt = ids_of(histories, branch)
        assert (
            prompt[: len(ids_of(histories, text)) - len(canonical(NEXT))]
            == ids_of(histories, text)[: -len(canonical(NEXT))]
        )
        assert len(prompt) > len(canonical(branch))
        assert answered(histories, spelt("world"), asked=branch) == prompt
        assert len(ids_of(histories, branch + "world" + NEXT)) == len(prompt) + 5 + len(canonical(NEXT))


def test_of_two_ways_to_say_the_same_the_latest_counts() -> None:
    histories = Histories()
    answered(histories, spelt(ANSWER))
    answered(histories, canonical(ANSWER))
    answered(histories, canonical(ANSWER))
    assert ids_of(histories, ASKED + ANSWER + NEXT) == canonical(ASKED + ANSWER + NEXT)
    assert len(kept(histories)) == 2


def test_a_turn_is_kept_as_what_it_adds() -> None:
    histories, text = Histories(), ASKED
    for _ in range(20):
        answered(histories, spelt(ANSWER), asked=text)
        text += ANSWER + NEXT
    assert sum(len(turn.text) for turn in histories._all.turns) == len(text) - len(NEXT)
    assert sum(len(turn.tokens) for turn in histories._all.turns) == len(ids_of(histories, text)) - len(canonical(NEXT))


@pytest.mark.parametrize(
    ("step", "more", "tokens_max", "cuts"),
    [
        (f"{END}x", END, 10_000, 1),
        ("x", "y" + END, 10_000, 1),  # no turn is followed by a special token
        (f"{END}x", END, 1, 3),  # each turn is, and the context is too small for all of them
    ],
)
def test_a_chat_that_many_turns_begin_is_cut_few_times(
    step: str, more: str, tokens_max: int, cuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories, text = Histories(), END
    for _ in range(200):
        text += step
        histories.keep("", text, canonical(text), None)
    calls, encode = [], TOKENIZER.encode

    def counted(text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        calls.append(text)
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(TOKENIZER, "encode", counted)
    prompt = ids_of(histories, text + more, tokens_max=tokens_max)
    assert len(calls) == cuts
    assert prompt == encode(text + more, add_special_tokens=False)


def test_longer_turns_that_do_not_fit_hide_no_shorter_one() -> None:
    histories = Histories()
    for said in (ANSWER, ANSWER + "<", ANSWER + "<|", ANSWER + "<|e"):
        answered(histories, spelt(said))
    assert goes_on(histories, ASKED)


def test_the_least_recently_used_are_forgotten_first() -> None:
    histories = Histories(turns_max=8)
    for text in CHATS[:2]:
        answered(histories, spelt(ANSWER), asked=text)
    assert goes_on(histories, CHATS[0]), "it is used"
    answered(histories, spelt(ANSWER), asked=CHATS[2])
    assert kept(histories) == [CHATS[0] + ANSWER, CHATS[2] + ANSWER]


def test_what_begins_a_chat_that_goes_on_otherwise_is_not_used() -> None:
    histories = Histories(turns_max=8)
    for text in CHATS[:2]:
        answered(histories, spelt(ANSWER), asked=text)
    assert ids_of(histories, CHATS[0] + ANSWER + "!" + NEXT) == canonical(CHATS[0] + ANSWER + "!" + NEXT)
    answered(histories, spelt(ANSWER), asked=CHATS[2])
    assert kept(histories) == [CHATS[1] + ANSWER, CHATS[2] + ANSWER]


def test_a_chat_is_forgotten_from_its_end() -> None:
    histories, text = Histories(turns_max=12), ASKED
    for _ in range(3):
        answered(histories, spelt(ANSWER), asked=text)
        text += ANSWER + NEXT
    answered(histories, spelt(ANSWER), asked=CHATS[0])
    assert kept(histories) == [NEXT + ANSWER, ASKED + ANSWER, CHATS[0] + ANSWER]
    assert len(ids_of(histories, text)) > len(canonical(text))


def test_an_address_displaces_only_its_own_beyond_its_share() -> None:
    histories = Histories(turns_max=8)
    answered(histories, spelt(ANSWER), client="near", asked=CHATS[0])
    for number, text in enumerate(CHATS):
        answered(histories, spelt(ANSWER), client=f"far {number}", asked=text)
    assert len(kept(histories)) == 3
    assert goes_on(histories, CHATS[0], "near")
    assert [goes_on(histories, text, f"far {number}") for number, text in enumerate(CHATS)] == [False] * 6 + [True] * 2


def test_addresses_together_are_bounded() -> None:
    histories = Histories(turns_max=8)
    for number in range(6):
        for text in CHATS[:2]:
            answered(histories, spelt(ANSWER), client=f"machine{number}", asked=text)
    assert [goes_on(histories, CHATS[0], f"machine{number}") for number in range(6)] == [False] * 2 + [True] * 4
    assert (len(kept(histories)), sorted(histories._at)) == (8, [f"machine{number}" for number in range(2, 6)])


def test_long_histories_are_bounded_together() -> None:
    histories = Histories(bytes_max=4000)
    for number in range(20):
        answered(histories, spelt(ANSWER), asked=f"{END}user {number}{END}")
        assert histories._all._bytes == sum(turn.bytes for turn in histories._all.turns) <= 1000
    before = kept(histories)
    assert len(before) > 1
    answered(histories, spelt("hello" * 100))
    assert kept(histories) == before, "what could not be kept displaces nothing"


def test_memory_is_counted_as_it_is_taken() -> None:
    """An emoji is four bytes of text, and four tokens when it is drawn byte by byte."""
    histories = Histories()
    answered(histories, spelt("🙂" * 1000))
    assert 20_000 <= histories._all._bytes <= 21_000


def test_drawn_tokens_that_leave_no_room_for_the_answer_give_way() -> None:
    histories, text = Histories(), ASKED + ANSWER + NEXT
    answered(histories, spelt(ANSWER))
    drawn = ids_of(histories, text)
    assert ids_of(histories, text, tokens_max=len(drawn)) == drawn
    assert ids_of(histories, text, tokens_max=len(drawn) - 1) == canonical(text)


def test_nothing_is_kept_where_nothing_may_be() -> None:
    histories = Histories(turns_max=0)
    answered(histories, spelt(ANSWER))
    assert ids_of(histories, ASKED + ANSWER + NEXT) == canonical(ASKED + ANSWER + NEXT)


@given(st.lists(st.integers(0, 365), max_size=30), st.text(max_size=20))
def test_whatever_is_drawn_the_prompt_says_what_the_chat_says(drawn: list[int], more: str) -> None:
    histories = Histories()
    turn = histories.begin(TOKENIZER, "", ASKED, 10_000)
    turn.answered(drawn, EOS_IDS)
    said = TOKENIZER.decode(drawn)
    text = f"{ASKED}{said}{END}{more}"
    prompt = ids_of(histories, text)
    assert TOKENIZER.decode(prompt) == TOKENIZER.decode(canonical(text))
    assert prompt.count(EOS) == text.count(END)
