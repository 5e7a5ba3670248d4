"""Who makes room in a full queue. Pure: is shown one lane's waiting sequences by client, and who wants to wait too.

A full queue belongs to all of its clients alike. A newcomer takes the place of the newest request of whoever holds
most, as long as that client still holds as much as the newcomer afterwards; so nobody is displaced back and forth. A
request that has begun keeps its place, also while it waits for room to go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.limits import QUEUED_PROMPT_TOKENS_MAX, QUEUED_REQUESTS_MAX
from coordinator.sequence import SequenceAsk, SequenceState


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What may wait in a lane."""

    requests: int = QUEUED_REQUESTS_MAX  # each choice counts as one
    prompt_tokens: int = QUEUED_PROMPT_TOKENS_MAX

    def over(self, asks: Sequence[SequenceAsk]) -> tuple[int, int]:
        """By how many requests, and by how many prompt tokens, these are too many."""
        return len(asks) - self.requests, prompt_tokens(asks) - self.prompt_tokens

    def hold(self, asks: Sequence[SequenceAsk]) -> bool:
        return max(self.over(asks)) <= 0

    def share(self, asks: Sequence[SequenceAsk]) -> float:
        """The larger one of the two parts that these take."""
        return max(len(asks) / self.requests, prompt_tokens(asks) / self.prompt_tokens)


def displaced(
    waiting: Mapping[str, Iterable[SequenceState]], asks: Sequence[SequenceAsk], limits: QueueLimits
) -> list[SequenceState] | None:
    """Who leaves so that these choices of one request may wait: nobody, mostly. None where they may not. An empty lane
    takes any one request."""
    held = {client: list(states) for client, states in waiting.items()}
    mine = [*_asks(held.pop(asks[0].client, ())), *asks]
    leaving: list[SequenceState] = []
    while not limits.hold([*mine, *_asks(state for states in held.values() for state in states)]):
        if len(mine) == len(asks) and not any(held.values()):
            return leaving
        newest = {client: request for client, states in held.items() if (request := _newest_request(states))}
        if not newest:
            return None
        most = max(newest, key=lambda client: limits.share(_asks(held[client])))
        held[most] = [state for state in held[most] if state not in newest[most]]
        if limits.share(_asks(held[most])) < limits.share(mine):
            return None
        leaving += newest[most]
    return leaving


def prompt_tokens(asks: Iterable[SequenceAsk]) -> int:
    """The choices of one request have one prompt, which is computed once."""
    return sum({id(ask.prompt): len(ask.prompt) for ask in asks}.values())


def _asks(states: Iterable[SequenceState]) -> list[SequenceAsk]:
    return [state.ask for state in states]


def _newest_request(states: Sequence[SequenceState]) -> list[SequenceState]:
    """Its choices; nothing where one of them has had room already. They come into the caches in their order."""
    if not states:
        return []
    number = states[-1].request
    choices = [state for state in states if state.request == number]
    begun = choices[0].number != number or any(state.times.admitted_s is not None for state in choices)
    return [] if begun else choices
