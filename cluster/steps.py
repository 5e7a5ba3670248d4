"""A step: one micro-batch's trip through the pipeline, and what comes back from it.

These values are what the scheduler decides, what a frame carries and what an engine executes. They know
nothing of text, HTTP or sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.types import AdapterId, HostTensor, SequenceId, StepId

Boundary = tuple[HostTensor, ...]
"""What the next layer needs: one tensor for each TensorSpec of the plan, each with a leading axis of packed tokens."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence's tokens are drawn. `seed` is always concrete: the API draws one when the client gave none."""

    seed: int
    choice: int = 0  # which of the request's n choices: part of the noise, so that choices differ
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Draw:
    """Asks the last stage for one token after a row's last position."""

    sampling: Sampling
    prompt_tokens: int  # positions below this are the prompt; presence and frequency count only what follows
    banned: tuple[int, ...] = ()  # ids that may not be drawn here (end of sequence below min_tokens)


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence's new tokens in a step, at positions [start, start + len(tokens))."""

    seq: SequenceId
    start: int
    tokens: tuple[int, ...]
    draw: Draw | None = None  # None for every prefill chunk but the last
    adapter: AdapterId | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Fork:
    """Let `dst` begin as a copy of the first `length` positions of `src`."""

    src: SequenceId
    dst: SequenceId
    length: int


@dataclass(frozen=True, slots=True)
class Move:
    """Let `dst` go on with the first `length` positions of `src`, which is forgotten. Nothing is copied."""

    src: SequenceId
    dst: SequenceId
    length: int


@dataclass(frozen=True, slots=True)
class Trim:
    """Cut `seq` back to its first `length` positions."""

    seq: SequenceId
    length: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget `seq` and free its cache. Dropping an unknown sequence is no error: cancels may cross."""

    seq: SequenceId


CacheVerb = Fork | Move | Trim | Drop


@dataclass(frozen=True, slots=True)
class Step:
    """Cache verbs first, in order, then the rows as one ragged batch. A step may have no rows."""

    id: StepId
    verbs: tuple[CacheVerb, ...]
    rows: tuple[Row, ...]

    @property
    def token_count(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class StageMark:
    """Where a step's time went on one stage. Durations only: clocks of different machines never mix."""

    stage: int
    receive_s: float  # from the first byte of the frame to the last
    queue_s: float  # waiting for the engine
    compute_s: float  # in the engine, sampling included


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token that the last stage drew."""

    seq: SequenceId
    position: int  # of the drawn token itself
    token: int


@dataclass(frozen=True, slots=True)
class Honoured:
    """What a Fork, Move or Trim really kept (at most what was asked, possibly 0); the scheduler prefills the rest."""

    seq: SequenceId
    length: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step came back whole."""

    step: StepId
    drawn: tuple[Drawn, ...]
    honoured: tuple[Honoured, ...]  # the smallest over the stages
    marks: tuple[StageMark, ...]


@dataclass(frozen=True, slots=True)
class StepFailed:
    """A stage could not compute a step; no row of it counts, but its verbs were obeyed everywhere. `seqs` are to
    blame, or nobody in particular when empty."""

    step: StepId
    stage: int
    reason: str
    seqs: tuple[SequenceId, ...] = ()
    honoured: tuple[Honoured, ...] = ()


StepOutcome = StepDone | StepFailed
