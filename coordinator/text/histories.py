"""Chats up to their latest answers, as the tokens that were read and drawn.

A model does not always draw the tokens into which its answer's text would be cut, so an answer that comes back in the
next turn as text would be another sequence to the model than the one it said, and the caches' one would end where they
part. Here a chat that goes on word for word is encoded with the tokens that were drawn. Exact, or nothing: the drawn
tokens stand for that very text, and what follows begins with a special token, so that it is cut alike whatever precedes
it. Knows neither templates nor requests.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.limits import HISTORIES_MAX, HISTORY_CHARS_MAX
from coordinator.text.tokenizer import Tokenizer


class Histories:
    """Bounded; the least recently used go first. A salt's histories are used for that salt alone. Long prompts are
    encoded in a thread of their own, so it may be used from several."""

    def __init__(self, *, histories_max: int = HISTORIES_MAX, chars_max: int = HISTORY_CHARS_MAX) -> None:
        self._histories_max, self._chars_max = histories_max, chars_max
        self._chars = 0
        self._ids: dict[tuple[str, str], array[int]] = {}  # by salt and text, the least recently used first
        self._lock = threading.Lock()

    def begin(self, tokenizer: Tokenizer, salt: str, text: str) -> Conversation:
        """A chat's next turn: its text up to where the answer begins."""
        with self._lock:
            known = [said for of, said in self._ids if of == salt and text.startswith(said)]
        for said in sorted(known, key=len, reverse=True):
            rest = tokenizer.encode_rest(text[len(said) :])
            with self._lock:
                ids = self._ids.pop((salt, said), None)
                if ids is not None:
                    self._ids[salt, said] = ids  # the most recently used one
            if rest is not None and ids is not None:
                return Conversation(self, tokenizer, salt, text, (*ids, *rest), said)
        return Conversation(self, tokenizer, salt, text, tokenizer.encode(text, add_special_tokens=False), None)

    def keep(self, salt: str, text: str, ids: Sequence[int], instead_of: str | None) -> None:
        """A text as these tokens, in place of the shorter one that it continues."""
        with self._lock:
            for said in (instead_of, text):
                if said is not None and self._ids.pop((salt, said), None) is not None:
                    self._chars -= len(said)
            self._ids[salt, text] = array("I", ids)
            self._chars += len(text)
            while len(self._ids) > self._histories_max or self._chars > self._chars_max:
                _, oldest = next(iter(self._ids))
                del self._ids[next(iter(self._ids))]
                self._chars -= len(oldest)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat that waits for its answer. `ids` is its prompt."""

    _histories: Histories
    _tokenizer: Tokenizer
    _salt: str
    _text: str
    ids: tuple[int, ...]
    _continues: str | None  # the history that it began with

    def answered(self, tokens: Sequence[int], eos_ids: Collection[int]) -> None:
        """The whole answer, its end of sequence included. Not kept where its tokens show less than they are: the
        template writes special tokens itself."""
        said = tokens[:-1] if tokens and tokens[-1] in eos_ids else tokens
        if not said or any(token in eos_ids or self._tokenizer.is_silent(token) for token in said):
            return
        try:
            text = b"".join(map(self._tokenizer.piece, said)).decode("utf-8")
        except UnicodeDecodeError:
            return
        self._histories.keep(self._salt, self._text + text, (*self.ids, *said), self._continues)
