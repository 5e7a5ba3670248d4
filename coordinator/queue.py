"""Sequences that wait for room: in two lanes, by client, first come first served in each.

Owns who is next, and when a client that was turned away should come back. Does not know how much room there is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from cluster.errors import AtCapacity
from cluster.limits import BATCH_PATIENCE_S, RETRY_AFTER_MAX_S
from coordinator.crowding import QueueLimits, displaced, prompt_tokens
from coordinator.events import SequenceDisplaced
from coordinator.lanes import Lane, Turns
from coordinator.sequence import SequenceAsk, SequenceState

RATE_WINDOW_S: Final = 60.0
"""The queue's pace is measured over this: several answers' time, and short enough to follow the load."""

RETRY_UNKNOWN_S: Final = 5.0
"""When to come back while nothing has left the queue yet: about an answer's time."""


class Queue:
    """Whoever was submitted and has no room, and whoever had to give room back."""

    def __init__(self, limits: QueueLimits | None = None) -> None:
        self._limits = limits or QueueLimits()
        self._lanes: dict[Lane, dict[str, deque[SequenceState]]] = {lane: {} for lane in Lane}
        self._turns = Turns()
        self._left: deque[tuple[float, int]] = deque()  # when somebody left for good, and with how long a prompt

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[SequenceState]:
        for clients in self._lanes.values():
            for waiting in clients.values():
                yield from waiting

    # -- Coming ------------------------------------------------------------------------------------------

    def make_room(self, asks: Sequence[SequenceAsk], now: float) -> list[SequenceDisplaced]:
        """Who has left so that these choices of one request may wait. AtCapacity where they may not."""
        waiting = self._lanes[asks[0].lane]
        leaving = displaced(waiting, asks, self._limits)
        if leaving is None:
            all_asks = [state.ask for states in waiting.values() for state in states]
            raise AtCapacity(
                f"{len(all_asks)} requests with {prompt_tokens(all_asks)} prompt tokens are waiting already; "
                "the queue takes no more, so try again later",
                retry_after_s=self._retry_after_s(*self._limits.over([*all_asks, *asks]), now),
            )
        back_s = self._retry_after_s(len(leaving), prompt_tokens(state.ask for state in leaving), now)
        for state in leaving:
            self.remove(state)
        return [SequenceDisplaced(state.ask.seq, back_s) for state in leaving]

    def push(self, state: SequenceState) -> None:
        self._of(state).append(state)

    def push_front(self, state: SequenceState) -> None:
        """It had room before and comes back before its client's others."""
        self._of(state).appendleft(state)

    def _of(self, state: SequenceState) -> deque[SequenceState]:
        return self._lanes[state.ask.lane].setdefault(state.ask.client, deque())

    # -- Going -------------------------------------------------------------------------------------------

    def heads(self) -> Iterator[SequenceState]:
        """The next one of each lane, in the order of their turns."""
        for lane in self._turns.lanes(lane for lane in Lane if self._lanes[lane]):
            yield self._lanes[lane][self._turns.client(lane, self._lanes[lane])][0]

    def is_impatient(self, state: SequenceState, now: float) -> bool:
        """It has waited so long that its lane no longer stands back."""
        return now - state.times.submitted_s >= BATCH_PATIENCE_S

    def take(self, state: SequenceState, tokens: int, now: float) -> None:
        """It leaves with room for so many tokens, which count as served."""
        self.remove(state)
        ask = state.ask
        self._turns.serve(ask.lane, ask.client, tokens - state.charged, equal=self.is_impatient(state, now))
        if state.charged == 0:
            self._left.append((now, len(ask.prompt)))
        state.charged = tokens

    def settle(self, state: SequenceState) -> None:
        """It has ended: what counts is what it used."""
        if state.charged:
            self._turns.correct(state.ask.lane, state.ask.client, len(state.tokens) - state.charged)

    def remove(self, state: SequenceState) -> None:
        clients = self._lanes[state.ask.lane]
        clients[state.ask.client].remove(state)
        if not clients[state.ask.client]:
            del clients[state.ask.client]

    def clear(self) -> None:
        for clients in self._lanes.values():
            clients.clear()

    def _retry_after_s(self, requests_over: int, tokens_over: int, now: float) -> float:
        """When the queue will have room, at the rate at which it has been emptied lately."""
        while self._left and now - self._left[0][0] > RATE_WINDOW_S:
            self._left.popleft()
        if not self._left:
            return RETRY_UNKNOWN_S
        span_s = max(now - self._left[0][0], 0.001)
        waits_s = requests_over * span_s / len(self._left)
        tokens_left = max(1, sum(tokens for _, tokens in self._left))
        waits_s = max(waits_s, tokens_over * span_s / tokens_left)
        return min(waits_s, RETRY_AFTER_MAX_S)
