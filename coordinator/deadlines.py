"""How long a sequence may take, and which of its limits has passed. Pure: the present is an argument."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cluster.limits import (
    BETWEEN_TOKENS_TIMEOUT_S,
    FIRST_TOKEN_TIMEOUT_S,
    QUEUE_TIMEOUT_S,
    REQUEST_TIMEOUT_S,
)


class Limit(enum.StrEnum):
    """What a sequence took too long for. Options, request fields and error codes are named after these; the total's
    are called `--request-timeout`, `timeout` and `total_timeout`."""

    QUEUE = "queue"
    FIRST_TOKEN = "first_token"  # noqa: S105 - no password
    BETWEEN_TOKENS = "token"
    TOTAL = "total"

    @property
    def field(self) -> str:
        """The field in which a request wishes for it."""
        return "timeout" if self is Limit.TOTAL else f"{self.value}_timeout"


@dataclass(slots=True)
class Times:
    """What has happened to a sequence so far, on the scheduler's clock."""

    submitted_s: float
    admitted_s: float | None = None  # when it left the queue for the first time
    token_s: float | None = None  # its latest token

    def go_on(self, now: float) -> None:
        """It was kept waiting by machines that went away, and what a stage may take begins anew."""
        if self.admitted_s is not None:
            self.admitted_s = now
        if self.token_s is not None:
            self.token_s = now


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Limits in seconds."""

    queue_s: float = QUEUE_TIMEOUT_S  # from its arrival until it has room in the caches
    first_token_s: float = FIRST_TOKEN_TIMEOUT_S  # from then on until its first token
    between_tokens_s: float = BETWEEN_TOKENS_TIMEOUT_S
    total_s: float = REQUEST_TIMEOUT_S  # from its arrival to its end
    asked: frozenset[Limit] = frozenset()  # those that are the request's own wish

    def shortened(self, wishes: Mapping[Limit, float]) -> Deadlines:
        """With what a request wishes itself: it may shorten its time, not lengthen it."""
        shorter = {limit: wished_s for limit, wished_s in wishes.items() if wished_s < self.seconds(limit)}
        queue_s, first_token_s, between_tokens_s, total_s = (
            shorter.get(limit, self.seconds(limit))
            for limit in (Limit.QUEUE, Limit.FIRST_TOKEN, Limit.BETWEEN_TOKENS, Limit.TOTAL)
        )
        return Deadlines(queue_s, first_token_s, between_tokens_s, total_s, self.asked | shorter.keys())

    def passed(self, times: Times, now: float) -> Limit | None:
        """The limit that has passed, if one has."""
        if now - times.submitted_s >= self.total_s:
            return Limit.TOTAL
        if times.token_s is not None:
            return Limit.BETWEEN_TOKENS if now - times.token_s >= self.between_tokens_s else None
        if times.admitted_s is not None:
            return Limit.FIRST_TOKEN if now - times.admitted_s >= self.first_token_s else None
        return Limit.QUEUE if now - times.submitted_s >= self.queue_s else None

    def seconds(self, limit: Limit) -> float:
        match limit:
            case Limit.QUEUE:
                return self.queue_s
            case Limit.FIRST_TOKEN:
                return self.first_token_s
            case Limit.BETWEEN_TOKENS:
                return self.between_tokens_s
            case Limit.TOTAL:
                return self.total_s


SERVER_DEADLINES: Final = Deadlines()
