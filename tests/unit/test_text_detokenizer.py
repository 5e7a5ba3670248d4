"""coordinator/text/detokenizer.py: the pieces add up to the whole, and no piece holds half a character."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.builtin import demo_model_path
from coordinator.text.detokenizer import Detokenizer
from coordinator.text.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizers import END, THINK, byte_fallback, byte_level, metaspace, word_pieces

LEVEL, FALLBACK = Tokenizer(byte_level()), Tokenizer(byte_fallback())


def pieces(tokenizer: Tokenizer, ids: Iterable[int], *, continues: bool = False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, continues=continues)
    return [*(detokenizer.push(id) for id in ids), detokenizer.finish()]


def added(backend: tokenizers.Tokenizer, token: str) -> int:
    id = backend.token_to_id(token)
    assert id is not None
    return id


@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_any_byte_level_tokens_add_up_to_the_whole_decoding(ids: list[int]) -> None:
    """Broken characters, special tokens and ids beyond the vocabulary included."""
    assert "".join(pieces(LEVEL, ids)) == LEVEL.decode(ids)


@pytest.mark.parametrize(
    ("tokenizer", "ids_max"),
    [
        (load_tokenizer(demo_model_path(), frozenset()), 1030),
        (Tokenizer(metaspace("always")), 16),
        (Tokenizer(metaspace("first")), 16),
        (Tokenizer(metaspace("never")), 16),
        (Tokenizer(word_pieces()), 10),
    ],
    ids=["built-in", "always a space", "a space first", "never a space", "word pieces"],
)
def test_any_tokens_of_other_tokenizers_add_up_too(tokenizer: Tokenizer, ids_max: int) -> None:
    @given(ids=st.lists(st.integers(0, ids_max), max_size=30))
    def check(ids: list[int]) -> None:
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)

    check()


@given(text=st.text(max_size=30))
@example(text="  two leading spaces")
@example(text="é naïve 你好 🙂")
def test_any_text_comes_back_from_byte_fallback_tokens(text: str) -> None:
    ids = FALLBACK.encode(text, add_special_tokens=True)
    assert "".join(pieces(FALLBACK, ids)) == FALLBACK.decode(ids) == text


@given(ids=st.lists(st.integers(0, 300), max_size=30))
def test_any_byte_fallback_tokens_differ_from_the_whole_only_around_broken_characters(ids: list[int]) -> None:
    """The library gives up a whole run of byte tokens for one bad byte; a stream has shown its good part by then."""
    whole, streamed = FALLBACK.decode(ids), "".join(pieces(FALLBACK, ids))
    assert streamed == whole or "\ufffd" in whole


@given(ids=st.lists(st.integers(0, 399), max_size=30), continues=st.booleans())
def test_pieces_are_always_valid_text(ids: list[int], continues: bool) -> None:
    for tokenizer in (LEVEL, FALLBACK):
        for piece in pieces(tokenizer, ids, continues=continues):
            piece.encode("utf-8")


def test_a_character_is_held_back_until_it_is_whole() -> None:
    """An emoji of four byte tokens appears with the fourth."""
    ids = [added(byte_fallback(), f"<0x{byte:02X}>") for byte in "🙂".encode()]
    assert pieces(FALLBACK, ids) == ["", "", "", "🙂", ""]


def test_a_character_cut_off_at_the_end_is_said_to_be_broken() -> None:
    ids = [added(byte_fallback(), f"<0x{byte:02X}>") for byte in "🙂".encode()[:2]]
    assert pieces(FALLBACK, ids) == ["", "", "\ufffd"]


def test_special_tokens_are_silent_and_other_added_tokens_are_shown() -> None:
    ids = [added(byte_level(), END), added(byte_level(), THINK), added(byte_level(), END)]
    assert pieces(LEVEL, ids) == ["", THINK, "", ""]


def test_an_added_token_outside_the_byte_alphabet_stands_for_itself() -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level().to_str())
    backend.add_tokens(["the → end"])
    tokenizer, id = Tokenizer(backend), added(backend, "the → end")
    assert "".join(pieces(tokenizer, [id, id])) == "the → endthe → end" == tokenizer.decode([id, id])


def test_tokens_that_the_settings_call_special_are_silent_too() -> None:
    tokenizer = Tokenizer(byte_level(), special_tokens=[THINK])
    assert pieces(tokenizer, [added(byte_level(), THINK)]) == ["", ""]


def test_the_leading_space_belongs_to_a_continuation_and_not_to_a_beginning() -> None:
    ids = [1, added(byte_fallback(), "▁the"), added(byte_fallback(), "▁a")]
    assert "".join(pieces(FALLBACK, ids)) == "the a"
    assert "".join(pieces(FALLBACK, ids, continues=True)) == " the a"


def test_the_text_so_far_is_never_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that has been seen before needs no decoding at all, so its cost cannot depend on the text's length."""
    detokenizer, ids = Detokenizer(FALLBACK, continues=True), FALLBACK.encode("the 你", add_special_tokens=True)
    first = [detokenizer.push(id) for id in ids]
    monkeypatch.setattr(FALLBACK, "decode", None)
    assert [detokenizer.push(id) for id in ids] == first == ["", " the", " ", "", "", "你"]


def test_an_order_dependent_decoder_is_refused() -> None:
    from cluster.errors import ModelError

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.decoder = tokenizers.decoders.BPEDecoder()
    with pytest.raises(ModelError, match="BPEDecoder"):
        Tokenizer(backend)


def test_a_tokenizer_that_truncates_is_told_not_to() -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level().to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    assert len(Tokenizer(backend).encode("stop the stops, hello", add_special_tokens=False)) > 3
    assert len(Tokenizer(backend).encode("hello", add_special_tokens=False)) < 50
