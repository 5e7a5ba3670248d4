"""What the scheduler tells those who asked: what became of a sequence. Pure values."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.types import SequenceId
from coordinator.deadlines import Limit
from coordinator.sequence import EndReason


@dataclass(frozen=True, slots=True)
class PrefixCached:
    """The first tokens of its prompt were not computed again. Told with its first token, where there are any."""

    seq: SequenceId
    tokens: int


@dataclass(frozen=True, slots=True)
class TokenDrawn:
    seq: SequenceId
    token: int


@dataclass(frozen=True, slots=True)
class SequenceEnded:
    seq: SequenceId
    reason: EndReason


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    seq: SequenceId
    reason: str
    unserved: bool = False  # there was no plan to go on with


@dataclass(frozen=True, slots=True)
class SequenceExpired:
    """It took longer than `seconds`, which a limit of its own or of the server allows."""

    seq: SequenceId
    limit: Limit
    seconds: float
    asked: bool  # the limit was the request's own


@dataclass(frozen=True, slots=True)
class SequenceDisplaced:
    """It waited in a full queue, of which its client held most, and made room for another client's. Nothing of it was
    computed yet."""

    seq: SequenceId
    retry_after_s: float


Event = PrefixCached | TokenDrawn | SequenceEnded | SequenceFailed | SequenceExpired | SequenceDisplaced
