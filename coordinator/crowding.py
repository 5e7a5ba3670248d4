"""Who makes room in a full queue. Pure: is shown one lane's waiting sequences by client, and who wants to wait too.

A full queue belongs to all addresses alike, and what an address holds to all of its clients alike: so nobody gets more
of it by making up keys. A newcomer takes the place of the newest request of whoever holds most, of those that hold no
less than the newcomer also afterwards; so nobody is displaced back and forth. A request that has begun keeps its place,
also while it waits for room to go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.limits import QUEUED_PROMPT_TOKENS_MAX, QUEUED_REQUESTS_MAX
from coordinator.lanes import address_of
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
    held = {client: list(states) for client, states in waiting.items() if states}
    leaving: list[SequenceState] = []
    while held and not limits.hold([*_asks(held, held), *asks]):
        request = _next_to_leave(held, asks, limits)
        if request is None:
            return None
        leaving += request
        held = _without(held, request)
    return leaving


_Held = Mapping[str, Sequence[SequenceState]]
"""What waits of each client that has something waiting."""


def _next_to_leave(held: _Held, asks: Sequence[SequenceAsk], limits: QueueLimits) -> list[SequenceState] | None:
    """The newest request of who holds most at the address that holds most, of those that hold enough without it; or
    else of another client at the newcomer's own address."""
    newest = {client: request for client, states in held.items() if (request := _newest_request(states))}
    for mine, others in _sides(held, asks[0].client):
        enough = limits.share([*_asks(held, mine), *asks])
        able = [
            (limits.share(_asks(held, party)), limits.share(_asks(held, [client])), client)
            for party in others
            for client in party
            if client in newest and limits.share(_asks(_without(held, newest[client]), party)) >= enough
        ]
        if able:
            return newest[max(able)[-1]]
    return None


def _sides(held: _Held, newcomer: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The newcomer's address and the other ones; then the newcomer and the other clients at its address."""
    by_address: dict[str, list[str]] = {address_of(newcomer): []}
    for client in held:
        by_address.setdefault(address_of(client), []).append(client)
    here = by_address.pop(address_of(newcomer))
    yield here, list(by_address.values())
    yield [client for client in here if client == newcomer], [[client] for client in here if client != newcomer]


def _without(held: _Held, request: Sequence[SequenceState]) -> dict[str, list[SequenceState]]:
    rest = {client: [state for state in states if state not in request] for client, states in held.items()}
    return {client: states for client, states in rest.items() if states}


def _asks(held: _Held, clients: Iterable[str]) -> list[SequenceAsk]:
    return [state.ask for client in clients for state in held.get(client, ())]


def prompt_tokens(asks: Iterable[SequenceAsk]) -> int:
    """The choices of one request have one prompt, which is computed once."""
    return sum({id(ask.prompt): len(ask.prompt) for ask in asks}.values())


def _newest_request(states: Sequence[SequenceState]) -> list[SequenceState]:
    """Its choices; nothing where one of them has had room already. They come into the caches in their order."""
    request = states[-1].request
    choices = [state for state in states if state.request == request]
    begun = choices[0].ask.seq != request or any(state.times.admitted_s is not None for state in choices)
    return [] if begun else choices
