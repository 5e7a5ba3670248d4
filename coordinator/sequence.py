"""One sequence as the scheduler sees it: its tokens, and how far the pipeline has been asked to compute them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cluster.steps import Draw, Row, Sampling
from cluster.types import SequenceId


class EndReason(enum.StrEnum):
    """Why a sequence ended well."""

    STOP = "stop"  # it drew an end-of-sequence token
    LENGTH = "length"  # max_tokens, or the context is full


@dataclass(frozen=True, slots=True)
class SequenceAsk:
    """What is wanted: one choice of one request."""

    seq: SequenceId
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    eos_ids: frozenset[int] = frozenset()

    @property
    def worst_case_tokens(self) -> int:
        """Cache positions that this sequence may come to need."""
        return len(self.prompt) + self.max_tokens


@dataclass(slots=True, eq=False)
class RunningSequence:
    """A running sequence. Positions below `sent` have been dispatched; at most the last token is still unsent
    once the prompt is through."""

    ask: SequenceAsk
    tokens: list[int] = field(init=False)
    sent: int = 0
    in_flight: int = 0  # steps on their way that hold a row of this sequence
    alone: bool = False  # computed in steps of its own, since a step that it shared has failed
    rewind_to: int | None = None  # a failed step's start: cut back to it before going on
    trimming_to: int | None = None  # the cut is on its way
    over: bool = False  # ended, failed or cancelled: nothing more may be sent

    def __post_init__(self) -> None:
        self.tokens = list(self.ask.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.ask.prompt)

    @property
    def unsent(self) -> int:
        return len(self.tokens) - self.sent

    @property
    def settled(self) -> bool:
        """Nothing of it needs to be put right before its next row."""
        return not self.over and self.rewind_to is None and self.trimming_to is None

    @property
    def prefilling(self) -> bool:
        """Several tokens to compute. Chunks follow each other through the pipeline without waiting."""
        return self.settled and (self.unsent > 1 or (self.unsent == 1 and self.generated == 0))

    @property
    def decoding(self) -> bool:
        """One drawn token to compute."""
        return self.settled and self.unsent == 1 and self.generated > 0 and self.in_flight == 0

    def take_row(self, tokens_max: int) -> Row:
        """The next row, marked as sent. It draws when it holds the last token."""
        start, end = self.sent, min(self.sent + tokens_max, len(self.tokens))
        self.sent = end
        self.in_flight += 1
        draw = self._draw() if end == len(self.tokens) else None
        return Row(self.ask.seq, start, tuple(self.tokens[start:end]), draw)

    def rewind(self, length: int) -> None:
        """A step that held positions from `length` on has failed."""
        self.rewind_to = length if self.rewind_to is None else min(self.rewind_to, length)

    def cut_to(self, length: int) -> None:
        """The cut came back: `length` positions are left on the stage that kept the fewest. Where that is fewer than
        asked, the other stages hold more and are cut once more, to the same length."""
        if self.trimming_to is not None and length < self.trimming_to:
            self.rewind(length)
        self.sent, self.trimming_to = length, None

    def _draw(self) -> Draw:
        ask = self.ask
        masked = self.generated < ask.min_tokens
        return Draw(ask.sampling, len(ask.prompt), tuple(sorted(ask.eos_ids)) if masked else ())

    def accept(self, token: int) -> EndReason | None:
        """Append a drawn token; tells whether the sequence ends with it."""
        self.tokens.append(token)
        ask = self.ask
        if token in ask.eos_ids and not ask.ignore_eos and self.generated > ask.min_tokens:
            return EndReason.STOP
        return EndReason.LENGTH if self.generated >= ask.max_tokens else None
