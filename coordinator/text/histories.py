"""Chats up to their latest answers, as the tokens that were read and drawn.

A model does not always draw the tokens into which its answer's text would be cut, so an answer that comes back in the
next turn as text would be another sequence to the model than the one it said, and the caches' one would end where they
part. Here a chat that goes on word for word is encoded with the tokens that were drawn. Exact, or nothing: the drawn
tokens stand for that very text, and what follows begins with a special token, so that it is cut alike whatever precedes
it. A turn keeps what it adds to the one before, so a chat may go on from any of its turns, and in several ways. Knows
neither templates nor requests.
"""

from __future__ import annotations

import math
import sys
import threading
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.limits import HISTORY_BYTES_MAX, HISTORY_SHARE, HISTORY_TURNS_MAX
from coordinator.lanes import address_of
from coordinator.text.tokenizer import Tokenizer

CANDIDATES_MAX: Final = 2
"""Turns from which a chat is tried to go on, the longest first. The first one fits, but for special tokens that begin
alike and contexts that it fills."""


class Histories:
    """Bounded: the least recently used turns go first, of an address that has its share and of all. A client's turns
    are used for that client alone. Long prompts are encoded in a thread of their own, so it may be used from several.
    """

    def __init__(self, *, turns_max: int = HISTORY_TURNS_MAX, bytes_max: int = HISTORY_BYTES_MAX) -> None:
        self._share = math.ceil(turns_max * HISTORY_SHARE), math.ceil(bytes_max * HISTORY_SHARE)
        self._all = _Turns(turns_max, bytes_max)
        self._at: dict[str, _Turns] = {}  # by address; none is empty
        self._lock = threading.Lock()

    def begin(self, tokenizer: Tokenizer, client: str, text: str, tokens_max: int) -> Conversation:
        """A chat's next turn: its text up to where the answer begins. Drawn tokens may be more than the text would
        be cut into: they are left out where the prompt would have more than `tokens_max` with them."""
        known = [turn for turn in self._known(client, text) if tokenizer.begins_special(text, turn.end)]
        for turn in known[:CANDIDATES_MAX]:
            rest = tokenizer.encode_rest(text[turn.end :])
            if rest is not None and turn.count + len(rest) <= tokens_max:
                with self._lock:
                    self._use(turn)
                return Conversation(self, tokenizer, client, text, (*turn.ids(), *rest), turn)
        return Conversation(self, tokenizer, client, text, tokenizer.encode(text, add_special_tokens=False), None)

    def keep(self, client: str, text: str, ids: Sequence[int], before: Turn | None) -> None:
        """A chat's text as these tokens. It began with the turn before."""
        with self._lock:
            if before not in self._all.turns:
                before = None
            begin, count = (before.end, before.count) if before else (0, 0)
            turn = Turn(client, before, text[begin:], array("I", ids[count:]), len(text), len(ids))
            if turn.bytes > self._share[1]:
                return
            here = self._at.setdefault(address_of(client), _Turns(*self._share))
            if (same := next(filter(turn.says_the_same, here.turns), None)) is None:
                here.add(turn)
                self._all.add(turn)
            self._use(same or turn)
            for turns in (here, self._all):
                while (oldest := turns.surplus()) is not None:
                    self._drop(oldest)

    def _known(self, client: str, text: str) -> list[Turn]:
        """The turns with which the text begins: the longest first, of equal ones the latest."""
        known: dict[Turn, None] = {}
        with self._lock:
            here = self._at.get(address_of(client))
            for turn in reversed(here.turns if here else {}):  # a turn comes after the one before it
                if turn.client == client and (turn.before is None or turn.before in known) and turn.continues(text):
                    known[turn] = None
        return sorted(known, key=lambda turn: turn.end, reverse=True)

    def _use(self, turn: Turn | None) -> None:
        """It and those before it are the latest now, in an order in which the oldest of all is before none."""
        while turn is not None:
            if turn in self._all.turns:
                self._all.use(turn)
                self._at[address_of(turn.client)].use(turn)
            turn = turn.before

    def _drop(self, turn: Turn) -> None:
        address = address_of(turn.client)
        self._all.drop(turn)
        self._at[address].drop(turn)
        if not self._at[address].turns:
            del self._at[address]


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A question and its answer: what they add to a chat."""

    client: str
    before: Turn | None
    text: str
    tokens: array[int]
    end: int  # where it ends, in characters of the whole chat
    count: int  # the chat's tokens up to there

    @property
    def bytes(self) -> int:
        return sys.getsizeof(self.text) + sys.getsizeof(self.tokens)

    def continues(self, text: str) -> bool:
        """The text goes on with it, where it goes on with the turns before."""
        return text.startswith(self.text, self.end - len(self.text))

    def says_the_same(self, other: Turn) -> bool:
        mine, theirs = ((one.client, one.before, one.text, one.tokens) for one in (self, other))
        return mine == theirs

    def ids(self) -> list[int]:
        """The whole chat's up to its end."""
        parts: list[array[int]] = []
        turn: Turn | None = self
        while turn is not None:
            parts.append(turn.tokens)
            turn = turn.before
        return [id for part in reversed(parts) for id in part]


class _Turns:
    """The least recently used first."""

    def __init__(self, turns_max: int, bytes_max: int) -> None:
        self.turns: dict[Turn, None] = {}
        self._turns_max, self._bytes_max = turns_max, bytes_max
        self._bytes = 0

    def add(self, turn: Turn) -> None:
        self.turns[turn] = None
        self._bytes += turn.bytes

    def use(self, turn: Turn) -> None:
        self.turns[turn] = self.turns.pop(turn)

    def drop(self, turn: Turn) -> None:
        del self.turns[turn]
        self._bytes -= turn.bytes

    def surplus(self) -> Turn | None:
        """Who must go, while these are too many or too large."""
        full = len(self.turns) > self._turns_max or self._bytes > self._bytes_max
        return next(iter(self.turns)) if full else None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat that waits for its answer. `ids` is its prompt."""

    _histories: Histories
    _tokenizer: Tokenizer
    _client: str
    _text: str
    ids: tuple[int, ...]
    _before: Turn | None  # what it goes on from

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
        self._histories.keep(self._client, self._text + text, (*self.ids, *said), self._before)
