"""One sequence as the scheduler sees it: its tokens, and how far the pipeline has been asked to compute them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cluster.steps import Draw, Row, Sampling
from cluster.types import SequenceId
from coordinator.deadlines import SERVER_DEADLINES, Deadlines, Times
from coordinator.lanes import Lane


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
    salt: str = ""  # shares what it begins with only with those that have the same
    open_ended: bool = False  # max_tokens is what the context leaves, not what the client named
    lane: Lane = Lane.INTERACTIVE
    client: str = ""  # whose turns it takes
    deadlines: Deadlines = SERVER_DEADLINES

    @property
    def worst_case_tokens(self) -> int:
        """Cache positions that this sequence may come to need."""
        return len(self.prompt) + self.max_tokens


@dataclass(slots=True, eq=False)
class SequenceState:
    """A sequence from its submission to its end. Positions below `sent` have been dispatched; at most the last token
    is still unsent once the prompt is through."""

    ask: SequenceAsk
    number: int  # in the order of arrival
    request: SequenceId  # its request's first choice
    times: Times
    tokens: list[int] = field(init=False)
    promised: int = 0  # cache positions reserved for it; 0 while it waits
    charged: int = 0  # tokens that counted as served to its client
    thrown_out: int = 0  # how often it had to give its room back
    fresh: bool = False  # it has room, and what it can share of others is not decided yet
    cached: int | None = None  # positions that it did not compute itself; None before it is decided
    pause_at: int = 0  # a row ends here, so that another sequence can begin as a fork of what there is then
    sent: int = 0
    in_flight: int = 0  # steps on their way that hold a row of this sequence
    alone: bool = False  # computed in steps of its own, since a step that it shared has failed
    rewind_to: int | None = None  # a failed step's start: cut back to it before going on
    trimming_to: int | None = None  # the cut is on its way
    breaks: int = 0  # plans in a row that broke while it had room, before it had another token

    def __post_init__(self) -> None:
        self.tokens = list(self.ask.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.ask.prompt)

    @property
    def unsent(self) -> int:
        return len(self.tokens) - self.sent

    @property
    def own_tokens(self) -> int:
        """Those that no other sequence has computed for it."""
        return len(self.tokens) - (self.cached or 0)

    @property
    def seniority(self) -> tuple[bool, int]:
        """Less is more. Who was thrown out once no longer stands back for the other lane."""
        return self.ask.lane is Lane.BATCH and self.thrown_out == 0, self.number

    @property
    def has_room(self) -> bool:
        """Whether all of its tokens may be cached."""
        return len(self.tokens) <= self.promised

    @property
    def settled(self) -> bool:
        """Nothing of it needs to be put right before its next row."""
        return self.rewind_to is None and self.trimming_to is None

    @property
    def prefilling(self) -> bool:
        """Several tokens to compute. Chunks follow each other through the pipeline without waiting."""
        ready = self.settled and self.has_room and not self.fresh
        return ready and (self.unsent > 1 or (self.unsent == 1 and self.generated == 0))

    @property
    def decoding(self) -> bool:
        """One drawn token to compute."""
        ready = self.settled and self.has_room and not self.fresh
        return ready and self.unsent == 1 and self.generated > 0 and self.in_flight == 0

    @property
    def answering(self) -> bool:
        """Its prompt is through, and tokens follow as fast as steps come back."""
        return self.generated > 0 and self.has_room and self.unsent <= 1

    def begin(self, promised: int, now: float) -> None:
        """It has room from here on, and nothing in the caches yet. None of its rows is under way."""
        self.promised, self.fresh = promised, True
        self.sent, self.rewind_to, self.trimming_to = 0, None, None
        if self.times.admitted_s is None:
            self.times.admitted_s = now

    def strand(self) -> None:
        """Its plan is gone, and all that stages had of it. It keeps its tokens."""
        self.breaks += self.promised > 0  # who only waited for room has broken nothing
        self.promised = self.sent = self.in_flight = self.pause_at = 0
        self.fresh = self.alone = False
        self.rewind_to = self.trimming_to = None
        if self.generated == 0:
            self.cached = None  # nobody was told

    def start(self, length: int) -> None:
        """It computes its tokens from here on: the stages have been asked for so many of the first ones. What it
        computed itself before it had to give its room back does not count as cached."""
        self.fresh, self.trimming_to = False, length or None
        self.cached = length if self.cached is None else min(self.cached, length)

    def pause(self, length: int) -> None:
        """Let no row that holds position `length` hold one before it."""
        self.pause_at = length if self.pause_at <= self.sent else min(self.pause_at, length)

    def take_row(self, tokens_max: int) -> Row:
        """The next row, marked as sent. It draws when it holds the last token."""
        start, end = self.sent, min(self.sent + tokens_max, len(self.tokens))
        end = min(end, self.pause_at) if start < self.pause_at else end
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
        self.cached = min(self.cached or 0, length)

    def _draw(self) -> Draw:
        ask = self.ask
        masked = self.generated < ask.min_tokens
        return Draw(ask.sampling, len(ask.prompt), tuple(sorted(ask.eos_ids)) if masked else ())

    def accept(self, token: int, now: float) -> EndReason | None:
        """Append a drawn token; tells whether the sequence ends with it."""
        self.tokens.append(token)
        self.times.token_s = now
        self.breaks = 0
        ask = self.ask
        if token in ask.eos_ids and not ask.ignore_eos and self.generated > ask.min_tokens:
            return EndReason.STOP
        return EndReason.LENGTH if self.generated >= ask.max_tokens else None
