"""Where a sequence can be cut back to, where layers forget: they look back a window only, or keep a state.

Owns: what such layers keep of a sequence (memory is promised from these numbers), and one sequence's ways back. The
rule follows from the whole model and from the steps a stage has computed, so that a stage whose own layers forget
nothing answers as the others do. Holds what engines give it to hold, without knowing what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

REWIND_TOKENS: Final = 64
"""Positions by which a sequence can always be cut back where layers look back a window: what a failed step or a few
drafted tokens need. Every one of them is kept in every such layer, beside the window."""

SNAPSHOT_TOKENS: Final = 256
"""A step that passes a multiple of this leaves a snapshot of the states at its end."""

SNAPSHOTS_MAX: Final = 2
"""Snapshots of one sequence: an early one, for prompts that begin alike, and the last. Each costs a whole state."""

Held = TypeVar("Held")


def window_tokens_kept(window: int) -> int:
    """Positions that a layer with this window needs to keep, the next one's among them."""
    return window + REWIND_TOKENS


def window_tokens_max(window: int) -> int:
    """Positions that it takes memory for: by an eighth more than it needs, so that old ones are seldom moved out."""
    return window_tokens_kept(window) * 9 // 8


@dataclass(frozen=True, slots=True)
class Rewind:
    """Where the sequences of a model can be cut back to: anywhere, unless a layer forgets; and always to nothing."""

    window: int | None = None  # the smallest of any layer: longer sequences give up to REWIND_TOKENS positions
    every: int | None = None  # some layer keeps a state: back to snapshots, left by steps that pass a multiple of this


EXACT: Final = Rewind()


def rewind_of(windows: Sequence[int | None], *, has_states: bool) -> Rewind:
    """The rule for a model whose layers look back so far."""
    return Rewind(
        min((window for window in windows if window is not None), default=None), SNAPSHOT_TOKENS if has_states else None
    )


class WaysBack(Generic[Held]):
    """Those of one sequence. `Held` is what an engine keeps to go back to a snapshot; on a stage without states it
    stands for nothing, and only its position counts."""

    __slots__ = ("_reach", "_rule", "_snapshots")

    def __init__(self, rule: Rewind) -> None:
        self._rule = rule
        self._reach = 0  # the most positions that it ever had
        self._snapshots: dict[int, Held] = {}  # by position, ascending

    @property
    def snapshots(self) -> tuple[Held, ...]:
        return tuple(self._snapshots.values())

    def wants_snapshot(self, start: int, end: int) -> bool:
        """Whether the step that computes positions [start, end) has to leave one."""
        every = self._rule.every
        return every is not None and end // every > start // every

    def grew(self, end: int, snapshot: Held | None = None) -> None:
        """A step has succeeded."""
        self._reach = max(self._reach, end)
        if snapshot is not None:
            self._snapshots[end] = snapshot
            if len(self._snapshots) > SNAPSHOTS_MAX:
                del self._snapshots[self._least_missed()]

    def honoured(self, length: int, asked: int) -> int:
        """How many of the first `asked` positions can be kept of the `length` that there are."""
        if asked >= length:
            return length
        kept = max(0, asked)
        if self._rule.every is not None:
            kept = max((position for position in self._snapshots if position <= asked), default=0)
        window = self._rule.window
        if window is not None and self._reach >= window_tokens_kept(window) and kept < self._reach - REWIND_TOKENS:
            return 0
        return kept

    def snapshot_at(self, position: int) -> Held | None:
        return self._snapshots.get(position)

    def cut(self, length: int) -> None:
        """What lay behind the first `length` positions is gone."""
        self._snapshots = {position: held for position, held in self._snapshots.items() if position <= length}

    def forked(self, length: int) -> WaysBack[Held]:
        """Those of a copy of the first `length` positions."""
        twin: WaysBack[Held] = WaysBack(self._rule)
        twin._reach = self._reach  # what has been forgotten is not in a copy either
        twin._snapshots = dict(self._snapshots)
        twin.cut(length)
        return twin

    def _least_missed(self) -> int:
        """The snapshot, never the last, whose loss leaves the shortest gap between two ways back."""
        positions = [0, *self._snapshots]
        triples = zip(positions, positions[1:], positions[2:], strict=False)
        return min((after - before, position) for before, position, after in triples)[1]
