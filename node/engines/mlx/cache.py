"""The KV memory of one stage: keys and values, or a state, of every sequence and owned layer.

A step writes into lanes in place and attends to them where they lie, so a decode step copies nothing. Owns: how long
sequences are, and their ways back. Knows nothing of attention; leaves to `seating` where sequences lie, and to `lane`
what a layer keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from cluster.limits import SEQUENCES_PER_USER
from cluster.rewinding import EXACT, Rewind, WaysBack
from cluster.types import SequenceId
from node.engines.mlx.lane import KvShape, Lane, LayerShape, Span, States, StateShape
from node.engines.mlx.seating import Seating


class KvCache:
    """The sequences of a stage, and how many positions they may hold together."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        kv_tokens: int,
        context_tokens: int,
        padding_bytes_max: int,
        rewind: Rewind = EXACT,
    ) -> None:
        self.kv_tokens = kv_tokens
        self.rewind = rewind
        self._shapes = tuple(shapes)
        token_bytes = sum(shape.bytes for shape in shapes if isinstance(shape, KvShape))
        rows_cost = any(isinstance(shape, StateShape) or shape.window is not None for shape in shapes)
        self._lengths: dict[SequenceId, int] = {}
        self._ways_back: dict[SequenceId, WaysBack[States]] = {}
        self._seating = Seating(
            shapes,
            self._lengths,
            kv_tokens=kv_tokens,
            context_tokens=context_tokens,
            padding_tokens_max=padding_bytes_max // max(1, token_bytes),
            rows_max=SEQUENCES_PER_USER * max(1, kv_tokens // context_tokens) if rows_cost else None,
        )

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def used_tokens(self) -> int:
        return sum(self._lengths.values())

    @property
    def allocated_bytes(self) -> int:
        held = [states for ways_back in self._ways_back.values() for states in ways_back.snapshots]
        # Forks share the snapshots of their source.
        snapshots = {id(array): array for states in held for arrays in states.values() for array in arrays}
        return self._seating.bytes + sum(int(array.nbytes) for array in snapshots.values())

    def length(self, seq: SequenceId) -> int:
        return self._lengths.get(seq, 0)

    def spans_for(self, wanted: Mapping[SequenceId, int]) -> list[Span]:
        """Where the wanted sequences lie, with room for that many more positions of each. Only `commit` makes these
        count."""
        return self._seating.spans_for(wanted)

    def lane_of(self, seq: SequenceId) -> Lane:
        return self._seating.lane_of(seq)

    def snapshots(self, span: Span, tokens: int) -> dict[SequenceId, States]:
        """What a step of so many tokens has to leave of the span's sequences to go back to. Not computed yet."""
        layers = [layer for layer, shape in enumerate(self._shapes) if isinstance(shape, StateShape)]
        found: dict[SequenceId, States] = {}
        for row, seq in span.seated:
            if self._ways_of(seq).wants_snapshot(self.length(seq), self.length(seq) + tokens):
                found[seq] = {layer: span.lane.copied_state(layer, row) for layer in layers}
        return found

    def commit(self, span: Span, tokens: int, snapshots: Mapping[SequenceId, States]) -> None:
        """From now on `tokens` more positions of each of the span's sequences count."""
        for _, seq in span.seated:
            end = self._lengths[seq] = self.length(seq) + tokens
            ways_back = self._ways_back[seq] = self._ways_of(seq)
            ways_back.grew(end, snapshots.get(seq))

    def reconcile(self) -> None:
        """After something failed: drop rows of sequences that never came to be, and sequences that lost theirs."""
        for seq in set(self._seating.seqs) ^ set(self._lengths):
            self.drop(seq)

    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        self._make_way(src, dst)
        honoured = self._honoured(src, min(length, self.kv_tokens - self.used_tokens))
        if honoured == 0:
            return 0
        earlier = self._earlier_states(src, honoured)
        parts = [(earlier.get(layer, ()), 0, honoured) for layer in range(len(self._shapes))]
        try:
            self._seating.copy(src, dst, parts, honoured)
        except BaseException:
            self.reconcile()  # with what the seating has lost
            raise
        self._lengths[dst] = honoured
        self._ways_back[dst] = self._ways_back[src].forked(honoured)
        return honoured

    def move(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        self._make_way(src, dst)
        if src in self._lengths:
            self._seating.hand_over(src, dst)
            self._lengths[dst], self._ways_back[dst] = self._lengths.pop(src), self._ways_back.pop(src)
        return self.trim(dst, length)

    def trim(self, seq: SequenceId, length: int) -> int:
        honoured = self._honoured(seq, length)
        if honoured == 0:
            self.drop(seq)
        else:
            self._restore(seq, self._earlier_states(seq, honoured))
            self._lengths[seq] = honoured
            self._ways_back[seq].cut(honoured)
        return honoured

    def _make_way(self, src: SequenceId, dst: SequenceId) -> None:
        if src == dst:
            raise ValueError(f"sequence {src} cannot be forked onto itself")
        self.drop(dst)

    def _restore(self, seq: SequenceId, states: States) -> None:
        lane = self.lane_of(seq)
        restored = {layer: lane.with_state(layer, lane.rows.index(seq), state) for layer, state in states.items()}
        mx.eval(list(restored.values()))
        for layer, arrays in restored.items():
            lane.store(layer, *arrays)

    def _earlier_states(self, seq: SequenceId, length: int) -> States:
        """Those after fewer positions than there are; nothing where no layer has one, or they are as they are."""
        return (self._ways_back[seq].snapshot_at(length) or {}) if length < self.length(seq) else {}

    def drop(self, seq: SequenceId) -> None:
        self._lengths.pop(seq, None)
        self._ways_back.pop(seq, None)
        self._seating.leave(seq)

    def _ways_of(self, seq: SequenceId) -> WaysBack[States]:
        return self._ways_back.get(seq) or WaysBack(self.rewind)

    def _honoured(self, seq: SequenceId, asked: int) -> int:
        return self._ways_of(seq).honoured(self.length(seq), asked)
