"""A model's tokenizer: text to ids, and each id to the bytes that it stands for.

Wraps the `tokenizers` library. Knows nothing of chats, streams or requests.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Final

import tokenizers

from cluster.errors import ModelError

_ORDER_DEPENDENT: Final = {"BPEDecoder", "CTC"}
"""Decoders of a few old models, in which a token's text depends on what follows: they cannot be streamed."""


class Tokenizer:
    """Encodes and takes apart. Ids that mean nothing, and special tokens, have no bytes."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Collection[str] = ()) -> None:
        # A tokenizer saved after training may cut texts short or pad them; a server must do neither.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._decoders = _decoder_types(backend)
        if found := self._decoders & _ORDER_DEPENDENT:
            raise ModelError(f"tokenizer.json uses the decoder {found.pop()}, which cannot be streamed")
        added = backend.get_added_tokens_decoder()
        self._special = {id for id, token in added.items() if token.special or token.content in special_tokens}
        self._special_texts = {added[id].content for id in self._special}
        self._special_lengths = {len(text) for text in self._special_texts}
        self._anchor = self._find_anchor()
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of `text`. Special tokens written out in the text are recognised; `add_special_tokens` also adds
        those that the model expects around a text (a chat template has written them already)."""
        return tuple(self._encoding(text, add_special_tokens).ids)

    def encode_rest(self, text: str) -> tuple[int, ...] | None:
        """Ids of a text that goes on after another one. None where they depend on it: unless a special token stands
        between, the cut may lie elsewhere."""
        ids = self.encode(text, add_special_tokens=False)
        first = self._backend.id_to_token(ids[0]) if ids and ids[0] in self._special else None
        return ids if first is not None and text.startswith(first) else None

    def begins_special(self, text: str, at: int) -> bool:
        """A special token is written there. Costs no more for a long text."""
        return any(text[at : at + length] in self._special_texts for length in self._special_lengths)

    def count(self, text: str) -> int:
        """How many tokens `text` has by itself."""
        return len(self._encoding(text, add_special_tokens=False))

    @cached_property
    def longest_token_chars(self) -> int:
        """No token stands for more characters than this (byte-level tokens are written with one per byte)."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        # Unlike encode, encode_batch_fast releases the interpreter lock, so a long text in a thread delays nobody;
        # and it leaves out the characters' offsets.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding

    def decode(self, ids: Collection[int]) -> str:
        """The text of a whole sequence, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def piece(self, id: int) -> bytes:
        """What the token adds to a text that has already begun; may end or begin in the middle of a character."""
        found = self._pieces.get(id)
        if found is None:
            found = self._pieces[id] = self._piece(id)
        return found

    def first_piece(self, id: int) -> bytes:
        """What the token says at the very beginning of a text, where some decoders leave a leading space out."""
        if "ByteLevel" in self._decoders:
            return self.piece(id)
        text = self.decode([id])
        return self.piece(id) if "\ufffd" in text else text.encode()

    def is_silent(self, id: int) -> bool:
        """Special tokens and unknown ids: a text that has only these has not begun."""
        return id in self._special or self._backend.id_to_token(id) is None

    def _piece(self, id: int) -> bytes:
        token = self._backend.id_to_token(id)
        if token is None or id in self._special:
            return b""
        if "ByteLevel" in self._decoders:
            return _byte_level(token)
        if "ByteFallback" in self._decoders and (byte := _fallback_byte(token)) is not None:
            return byte
        if self._anchor is None:
            return self.decode([id]).encode()
        before, both = self.decode([self._anchor]), self.decode([self._anchor, id])
        return both[len(before) :].encode()

    def _find_anchor(self) -> int | None:
        """A plain token to put before another one, so that the other one does not stand at the beginning."""
        for id in range(self._backend.get_vocab_size()):
            if not self.is_silent(id) and self.decode([id]).isalpha() and self.decode([id]).isascii():
                return id
        return None


def load_tokenizer(folder: Path, special_tokens: Collection[str]) -> Tokenizer:
    """Read tokenizer.json. `special_tokens` are those that the model's settings name besides."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json. Potluck needs the fast tokenizer's file; with transformers installed, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes it"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a file that it cannot read
        raise ModelError(f"{path} is damaged or newer than the installed tokenizers library: {error}") from error
    return Tokenizer(backend, special_tokens)


def _decoder_types(backend: tokenizers.Tokenizer) -> set[str]:
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself where it is one, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_ALPHABET: Final = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    """A token in the byte-level alphabet; one that uses other characters (an added token) stands for itself."""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


def _fallback_byte(token: str) -> bytes | None:
    """The byte of a token such as <0xE4>."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return None
    return None
