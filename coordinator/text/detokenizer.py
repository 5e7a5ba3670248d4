"""Token ids to text, one at a time, never showing half a character.

Works on bytes: each token stands for some, and a UTF-8 decoder holds back what does not yet make a character. So a
token costs the same however long the text is, and the pieces add up to the decoding of the whole.
"""

from __future__ import annotations

import codecs

from coordinator.text.tokenizer import Tokenizer


class Detokenizer:
    """One choice's text. `continues` says that it goes on after a prompt's text rather than beginning afresh."""

    def __init__(self, tokenizer: Tokenizer, *, continues: bool) -> None:
        self._tokenizer = tokenizer
        self._begun = continues
        # Bytes that can never become a character are shown as U+FFFD, one for each maximal part (Unicode 3.9, D93b).
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes; empty for special tokens and parts of a character."""
        if self._begun:
            return self._decoder.decode(self._tokenizer.piece(token))
        self._begun = not self._tokenizer.is_silent(token)
        return self._decoder.decode(self._tokenizer.first_piece(token) if self._begun else b"")

    def finish(self) -> str:
        """U+FFFD if the text ends in the middle of a character, else nothing."""
        return self._decoder.decode(b"", final=True)
