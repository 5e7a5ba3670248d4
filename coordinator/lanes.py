"""Whose turn it is: two lanes, and in each of them clients, served in proportion to tokens.

Start-time fair queueing: everybody has a clock that runs with the tokens they were given, and the one whose clock is
furthest behind comes next. Who was away comes back at the present, so nobody saves up turns. Knows neither prompts nor
caches; the same rule orders the queue and the prompts of a step.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Final

ADDRESS_END: Final = " "
"""Stands in a client's name between its address and the key that it sent, if it sent one."""

CLIENTS_KEPT: Final = 1024
"""Clocks of clients. Of more, those least ahead are forgotten: they have the least to lose by waiting."""


def address_of(client: str) -> str:
    """Where a client is. Keys can be made up; an address is a machine, or a proxy before several."""
    return client.partition(ADDRESS_END)[0]


class Lane(enum.StrEnum):
    """Somebody is waiting for an answer, or a program works through many."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


LANE_WEIGHTS: Final = {Lane.INTERACTIVE: 9.0, Lane.BATCH: 1.0}
"""While both lanes want more than there is, a tenth of the tokens is the batch lane's: enough to go on, too little to
be felt by a person who waits."""


class Clocks:
    """One clock for each name, in tokens."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._present = 0.0  # where the last one that was served stood before

    def at(self, name: str) -> float:
        return max(self._at.get(name, 0.0), self._present)

    def serve(self, name: str, tokens: float) -> None:
        start = self.at(name)
        self._present = start
        self._at[name] = start + tokens
        if len(self._at) > CLIENTS_KEPT:
            ahead = sorted(self._at.items(), key=lambda item: item[1])
            self._at = dict(ahead[CLIENTS_KEPT // 2 :])

    def correct(self, name: str, tokens: float) -> None:
        """What was served turned out to be more by so many tokens, or less where negative."""
        if name in self._at:
            self._at[name] += tokens


class Turns:
    """The order of lanes, and of clients within a lane."""

    def __init__(self) -> None:
        self._lanes = Clocks()
        self._clients = {lane: Clocks() for lane in Lane}

    def lanes(self, present: Iterable[Lane]) -> list[Lane]:
        """Those present, the next one first. Who waits in person goes first among equals."""
        order = list(Lane)
        return sorted(present, key=lambda lane: (self._lanes.at(lane), order.index(lane)))

    def client(self, lane: Lane, present: Iterable[str]) -> str:
        """Whose turn it is in a lane; among equals the first one named."""
        return min(present, key=self._clients[lane].at)

    def serve(self, lane: Lane, client: str, tokens: int, *, equal: bool = False) -> None:
        """Tokens were given. `equal` counts them as if both lanes had the same weight."""
        weight = LANE_WEIGHTS[Lane.INTERACTIVE] if equal else LANE_WEIGHTS[lane]
        self._lanes.serve(lane, tokens / weight)
        self._clients[lane].serve(client, tokens)

    def correct(self, lane: Lane, client: str, tokens: int) -> None:
        """Fewer tokens were given in the end (negative), or more."""
        self._lanes.correct(lane, tokens / LANE_WEIGHTS[lane])
        self._clients[lane].correct(client, tokens)
