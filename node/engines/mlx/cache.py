"""The KV memory of one stage: keys and values, or a state, of every sequence and owned layer.

Sequences that compute together live together, in a lane. A step writes into a lane in place and attends to it where it
lies, so a decode step copies nothing; sequences move only when the company changes or a lane is full. A lane is as
long as its longest sequence, and that padding is bounded twice: it may not cost more than reading the weights once
more, and lanes together take no more positions than were promised (but for rounding up). Knows nothing of attention,
and leaves to `lane` what a layer keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx

from cluster.rewinding import EXACT, Rewind, WaysBack
from cluster.types import SequenceId
from node.engines.mlx.lane import KvShape, Lane, LayerShape, Part, States, StateShape

_ROUND_TOKENS = 16
_SLACK_TOKENS_MIN = 64


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
        self._shapes = tuple(shapes)
        self._context_tokens = context_tokens
        self.rewind = rewind
        token_bytes = sum(shape.bytes for shape in shapes if isinstance(shape, KvShape))
        self._padding_tokens_max = padding_bytes_max // max(1, token_bytes)
        self._lengths: dict[SequenceId, int] = {}
        self._ways_back: dict[SequenceId, WaysBack[States]] = {}
        self._lanes: dict[SequenceId, Lane] = {}

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
        return sum(lane.bytes for lane in self._all_lanes()) + sum(int(array.nbytes) for array in snapshots.values())

    def length(self, seq: SequenceId) -> int:
        return self._lengths.get(seq, 0)

    def lanes_for(self, wanted: Mapping[SequenceId, int]) -> list[Lane]:
        """Lanes that together hold exactly the wanted sequences, with room for that many more positions of each.
        Sequences that want different numbers are in different lanes. Only `commit` makes the positions count."""
        lanes: list[Lane] = []
        for tokens in dict.fromkeys(wanted.values()):
            for company in self._companies(seq for seq, count in wanted.items() if count == tokens):
                lane = self._lane_for(company, tokens)
                if lane is None:
                    self._spread(wanted)
                    return [self._lanes[seq] for seq in wanted]
                lanes.append(lane)
        return lanes

    def snapshots(self, lane: Lane, tokens: int) -> dict[SequenceId, States]:
        """What a step of so many tokens has to leave of the lane's sequences to go back to. Not computed yet."""
        layers = [layer for layer, shape in enumerate(self._shapes) if isinstance(shape, StateShape)]
        found: dict[SequenceId, States] = {}
        for row, seq in enumerate(lane.rows):
            if seq is not None and self._ways_of(seq).wants_snapshot(self.length(seq), self.length(seq) + tokens):
                found[seq] = {layer: lane.copied_state(layer, row) for layer in layers}
        return found

    def commit(self, lane: Lane, tokens: int, snapshots: Mapping[SequenceId, States]) -> None:
        """From now on `tokens` more positions of each of the lane's sequences count."""
        for seq in lane.live:
            end = self._lengths[seq] = self.length(seq) + tokens
            ways_back = self._ways_back[seq] = self._ways_of(seq)
            ways_back.grew(end, snapshots.get(seq))

    def forget_uncommitted(self) -> None:
        """Drop rows that were made for sequences which then never came to be."""
        for seq in [seq for seq in self._lanes if seq not in self._lengths]:
            self.drop(seq)

    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        self._make_way(src, dst)
        honoured = self._honoured(src, min(length, self.kv_tokens - self.used_tokens))
        if honoured == 0:
            return 0
        if sum(lane.tokens for lane in self._all_lanes()) + _rounded(honoured) > self.kv_tokens:
            self._spread({})
        source = self._lanes[src]
        row = source.rows.index(src)
        earlier = self._earlier_states(src, honoured)
        twin = Lane([dst], _rounded(honoured), len(self._shapes))
        for layer, shape in enumerate(self._shapes):
            state = earlier.get(layer)
            twin.fill(layer, shape, [(state, 0, honoured) if state else (source.arrays[layer], row, honoured)])
        self._lanes[dst], self._lengths[dst] = twin, honoured
        self._ways_back[dst] = self._ways_back[src].forked(honoured)
        return honoured

    def move(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        self._make_way(src, dst)
        lane = self._lanes.pop(src, None)
        if lane is not None:
            lane.rows[lane.rows.index(src)] = dst
            self._lanes[dst] = lane
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
        lane = self._lanes[seq]
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
        lane = self._lanes.pop(seq, None)
        if lane is not None:
            lane.rows[lane.rows.index(seq)] = None

    def clear(self) -> None:
        self._lengths.clear()
        self._ways_back.clear()
        self._lanes.clear()

    def _ways_of(self, seq: SequenceId) -> WaysBack[States]:
        return self._ways_back.get(seq) or WaysBack(self.rewind)

    def _honoured(self, seq: SequenceId, asked: int) -> int:
        return self._ways_of(seq).honoured(self.length(seq), asked)

    def _all_lanes(self) -> list[Lane]:
        return list({id(lane): lane for lane in self._lanes.values()}.values())

    def _companies(self, seqs: Iterable[SequenceId]) -> list[list[SequenceId]]:
        """Sequences of similar length: padding to the longest costs less than another forward would."""
        companies: list[list[SequenceId]] = []
        padding = 0
        for seq in sorted(seqs, key=self.length):
            if companies:
                padding += len(companies[-1]) * (self.length(seq) - self.length(companies[-1][-1]))
            if companies and padding <= self._padding_tokens_max:
                companies[-1].append(seq)
            else:
                companies.append([seq])
                padding = 0
        return companies

    def _lane_for(self, company: Sequence[SequenceId], tokens: int) -> Lane | None:
        """The company's lane, built anew when it must be; None when the promised memory does not allow it."""
        needed = self.length(company[-1]) + tokens
        lane = self._lanes.get(company[0])
        if lane is not None and needed <= lane.capacity and set(lane.rows) == set(company):
            return lane
        staying = [old for old in self._all_lanes() if not set(old.rows) & set(company)]
        leaving = [seq for old in self._all_lanes() if old not in staying for seq in old.live if seq not in company]
        elsewhere = sum(old.tokens for old in staying) + sum(self._lanes[seq].capacity for seq in leaving)
        slack = max(_SLACK_TOKENS_MIN, needed // 4)
        for capacity in (_rounded(max(needed, min(needed + slack, self._context_tokens))), _rounded(needed)):
            if elsewhere + len(company) * capacity <= self.kv_tokens:
                self._rebuild([(company, capacity)])
                return self._lanes[company[0]]
        return None

    def _spread(self, wanted: Mapping[SequenceId, int]) -> None:
        """Give every sequence a lane of its own, no longer than it must be: the least memory that holds them."""
        needed = {seq: self.length(seq) + wanted.get(seq, 0) for seq in (*self._lengths, *wanted)}
        self._rebuild([([seq], _rounded(length)) for seq, length in needed.items()])

    def _rebuild(self, plan: Sequence[tuple[Sequence[SequenceId], int]]) -> None:
        """Move sequences to new lanes, layer by layer, so that one layer at a time is there twice. Those that
        shared a lane with them and are not in the plan stay together in a smaller one."""
        moving = {seq for company, _ in plan for seq in company}
        old_lanes = list({id(lane): lane for seq in moving if (lane := self._lanes.get(seq)) is not None}.values())
        rest = [(left, lane.capacity) for lane in old_lanes if (left := [s for s in lane.live if s not in moving])]
        new_lanes = [Lane(company, capacity, len(self._shapes)) for company, capacity in (*plan, *rest)]
        origins = {seq: (lane, lane.rows.index(seq)) for lane in old_lanes for seq in lane.live}
        try:
            for layer in range(len(self._shapes)):
                for lane in new_lanes:
                    lane.fill(
                        layer, self._shapes[layer], [self._part(origins.get(seq), layer, seq) for seq in lane.live]
                    )
                for lane in old_lanes:
                    lane.arrays[layer] = ()
        except BaseException:
            # Half of the layers have moved: what these sequences held is lost, and must not pass for whole.
            for seq in {seq for lane in (*new_lanes, *old_lanes) for seq in lane.live}:
                self.drop(seq)
            raise
        for lane in new_lanes:
            self._lanes |= dict.fromkeys(lane.live, lane)

    def _part(self, origin: tuple[Lane, int] | None, layer: int, seq: SequenceId) -> Part:
        if origin is None:
            return ((), 0, 0)
        lane, row = origin
        return (lane.arrays[layer], row, self.length(seq))


def _rounded(tokens: int) -> int:
    return -(-tokens // _ROUND_TOKENS) * _ROUND_TOKENS
