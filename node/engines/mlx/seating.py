"""Which lane and row each sequence lies in, and when it moves.

Sequences that compute together lie together. One that leaves its company leaves its row empty, one that joins it
takes an empty row, so nobody else moves; a forward computes a run of rows, and the few of them that are empty, or
somebody else's, for nobody. A whole company moves only when its lane is full, too short or too full of others. A lane
is as long as its longest sequence, and that padding is bounded twice: it may not cost more than reading the weights
once more, and lanes together take no more positions than were promised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx

from cluster.types import SequenceId
from node.engines.mlx.lane import Lane, LayerShape, Part, Span

_ROUND_TOKENS = 16
_SLACK_TOKENS_MIN = 64

_New = tuple[Sequence[SequenceId], int, int]
"""A lane to be: who lies in it, how many rows it has, its capacity."""


_Origin = tuple[Lane, int, int]
"""Where a sequence lies, and how long it is."""


class Seating:
    """The lanes of a stage. Reads how long sequences are; never changes that."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        lengths: Mapping[SequenceId, int],
        *,
        kv_tokens: int,
        context_tokens: int,
        padding_tokens_max: int,
        rows_max: int | None,
    ) -> None:
        self._shapes = tuple(shapes)
        self._lengths = lengths
        self._kv_tokens = kv_tokens
        self._context_tokens = context_tokens
        self._padding_tokens_max = padding_tokens_max
        self._rows_max = rows_max  # empty ones included; None where a row costs what its positions cost
        self._lanes: dict[SequenceId, Lane] = {}

    @property
    def seqs(self) -> tuple[SequenceId, ...]:
        return tuple(self._lanes)

    @property
    def bytes(self) -> int:
        return sum(lane.bytes for lane in self._all())

    def lane_of(self, seq: SequenceId) -> Lane:
        return self._lanes[seq]

    def spans_for(self, wanted: Mapping[SequenceId, int]) -> list[Span]:
        """Runs of rows that together hold exactly the wanted sequences, with room for that many more positions of
        each. Sequences that want different numbers are in different lanes."""
        companies = self._settled(wanted)
        if companies is None and (idle := [seq for seq in self._lanes if seq not in wanted]):
            least = [(seq, min(_rounded(self._length(seq)), self._lanes[seq].capacity)) for seq in idle]
            self._rebuild([([seq], 1, capacity) for seq, capacity in least], self._all())
            companies = self._settled(wanted)
        if companies is None:
            companies = self._spread(wanted)
        return [Span.over(self._lanes[company[0]], company) for company in companies]

    def copy(self, src: SequenceId, dst: SequenceId, parts: Sequence[Part], length: int) -> None:
        """Give `dst` a lane of its own, with these parts of layers, or what `src` has where a part holds nothing."""
        if not self._fits(self._all(), 1, _rounded(length)):
            self._rebuild([], self._all())
            if self._room_beside(self._all()) < length:
                self._spread({}, beside=length)
        capacity = min(_rounded(length), self._room_beside(self._all()))
        source, twin = self._lanes[src], Lane([dst], capacity, len(self._shapes))
        row = source.rows.index(src)
        for layer, shape in enumerate(self._shapes):
            twin.fill(layer, shape, [parts[layer] if parts[layer][0] else (source.arrays[layer], row, length)])
        self._lanes[dst] = twin

    def hand_over(self, src: SequenceId, dst: SequenceId) -> None:
        """Let `dst` lie where `src` lay."""
        lane = self._lanes[dst] = self._lanes.pop(src)
        lane.rows[lane.rows.index(src)] = dst

    def leave(self, seq: SequenceId) -> None:
        lane = self._lanes.pop(seq, None)
        if lane is not None:
            lane.rows[lane.rows.index(seq)] = None

    def _all(self) -> list[Lane]:
        return list({id(lane): lane for lane in self._lanes.values()}.values())

    def _length(self, seq: SequenceId) -> int:
        return self._lengths.get(seq, 0)

    def _fits(self, lanes: Sequence[Lane], rows: int, tokens: int) -> bool:
        """Whether the promise holds these lanes and another one."""
        if self._rows_max is not None and sum(len(lane.rows) for lane in lanes) + rows > self._rows_max:
            return False
        return tokens <= self._room_beside(lanes)

    def _room_beside(self, lanes: Sequence[Lane]) -> int:
        """Positions that the promise holds beside these lanes."""
        return self._kv_tokens - sum(lane.tokens for lane in lanes)

    def _settled(self, wanted: Mapping[SequenceId, int]) -> list[list[SequenceId]] | None:
        """Those that compute together, each company in a lane of its own; None when these would be too long."""
        settled: list[list[SequenceId]] = []
        for tokens in dict.fromkeys(wanted.values()):
            for company in self._companies(seq for seq, count in wanted.items() if count == tokens):
                others = {seq for earlier in settled for seq in earlier}
                if not (self._join(company, tokens, others) or self._move_out(company, tokens)):
                    return None
                settled.append(company)
        return settled

    def _companies(self, seqs: Iterable[SequenceId]) -> list[list[SequenceId]]:
        """Sequences of similar length: padding to the longest costs less than another forward would."""
        companies: list[list[SequenceId]] = []
        padding = 0
        for seq in sorted(seqs, key=self._length):
            if companies:
                padding += len(companies[-1]) * (self._length(seq) - self._length(companies[-1][-1]))
            if companies and padding <= self._padding_tokens_max:
                companies[-1].append(seq)
            else:
                companies.append([seq])
                padding = 0
        return companies

    def _join(self, company: Sequence[SequenceId], tokens: int, settled: set[SequenceId]) -> bool:
        """Whether the lane that most of the company lie in can take the others in; then it has."""
        lanes = {id(lane): lane for seq in company if (lane := self._lanes.get(seq)) is not None}
        if not lanes:
            return False
        most = Counter(id(self._lanes[seq]) for seq in company if seq in self._lanes).most_common(1)[0][0]
        lane = lanes[most]
        # Two forwards of one step would each write into the lane as it was before.
        if self._length(company[-1]) + tokens > lane.capacity or settled & set(lane.live):
            return False
        joining = [seq for seq in company if self._lanes.get(seq) is not lane]
        taken = [row for row, seq in enumerate(lane.rows) if seq in company]
        near = sorted(
            (row for row, seq in enumerate(lane.rows) if seq is None),
            key=lambda row: max(min(taken) - row, row - max(taken)),
        )[: len(joining)]
        run = max([*taken, *near]) - min([*taken, *near]) + 1
        if len(near) < len(joining) or run - len(company) > _idle_rows_max(len(company)):
            return False
        if joining:
            self._take_in(lane, dict(zip(near, joining, strict=True)))
        return True

    def _take_in(self, lane: Lane, seats: Mapping[int, SequenceId]) -> None:
        """Copy sequences, and nothing else, into empty rows."""
        parts = {row: self._origin(seq) for row, seq in seats.items()}
        try:
            for layer, shape in enumerate(self._shapes):
                lane.take_in(layer, shape, {row: _part(origin, layer) for row, origin in parts.items()})
            mx.async_eval(lane.arrays)
        except BaseException:
            # Half of the layers were taken in: nobody in this lane is whole.
            for seq in lane.live:
                self.leave(seq)
            raise
        for row, seq in seats.items():
            self.leave(seq)
            lane.rows[row] = seq
            self._lanes[seq] = lane

    def _move_out(self, company: Sequence[SequenceId], tokens: int) -> bool:
        """Give the company a new lane; False when the promised memory does not allow it."""
        needed = self._length(company[-1]) + tokens
        slack = max(_SLACK_TOKENS_MIN, needed // 4)
        roomy = _rounded(max(needed, min(needed + slack, self._context_tokens)))
        staying = [lane for lane in self._all() if not set(lane.live) <= set(company)]
        count = len(company)
        spare = count // 2 if self._rows_max is None else 0
        if spare and self._fits(staying, count + spare, 2 * (count + spare) * roomy):
            self._rebuild([(company, count + spare, roomy)], [])
            return True
        if self._fits(staying, count, count * roomy):
            self._rebuild([(company, count, roomy)], [])
            return True
        left = sum(lane.capacity for lane in staying for seq in lane.live if seq not in company)
        each = (self._kv_tokens - left) // count
        for capacity in (roomy, min(_rounded(needed), each)):
            if needed <= capacity <= each:
                self._rebuild([(company, count, capacity)], staying)
                return True
        return False

    def _spread(self, wanted: Mapping[SequenceId, int], beside: int = 0) -> list[list[SequenceId]]:
        """Make lanes no longer than they must be, with room for so many positions beside them. Returns the wanted
        sequences, company by company; each in a lane of its own, where padding would not fit: the least memory that
        holds them."""
        needed = {seq: self._length(seq) + wanted.get(seq, 0) for seq in (*self._lanes, *wanted)}
        room = self._kv_tokens - beside
        companies = [
            company
            for tokens in dict.fromkeys(wanted.values())
            for company in self._companies(seq for seq, count in wanted.items() if count == tokens)
        ]
        idle = [[seq] for seq in self._lanes if seq not in wanted]
        if sum(len(company) * needed[company[-1]] for company in (*companies, *idle)) > room:
            companies = [[seq] for seq in wanted]
        room -= sum(len(company) * needed[company[-1]] for company in (*companies, *idle))
        lanes: list[_New] = []
        for company in (*companies, *idle):
            length = needed[company[-1]]
            ahead = min(_rounded(length) - length, max(0, room) // len(company))
            room -= ahead * len(company)
            lanes.append((company, len(company), length + ahead))
        self._rebuild(lanes, [])
        return companies

    def _rebuild(self, wanted: Sequence[_New], squeezed: Sequence[Lane]) -> None:
        """Move sequences to new lanes, layer by layer, so that one layer at a time is there twice. The squeezed lanes
        lose rows that are empty, then."""
        leaving = {seq for company, _, _ in wanted for seq in company}
        left: list[_New] = [
            (seqs, len(seqs), lane.capacity)
            for lane in squeezed
            if (seqs := [seq for seq in lane.live if seq not in leaving]) and len(seqs) < len(lane.rows)
        ]
        plan = [*wanted, *left]
        origins: dict[SequenceId | None, _Origin | None] = {
            seq: self._origin(seq) for company, _, _ in plan for seq in company
        }
        new_lanes = [_lane(*new, len(self._shapes)) for new in plan]
        ending = [lane for lane in self._all() if set(lane.live) <= origins.keys()]
        try:
            for layer, shape in enumerate(self._shapes):
                for lane in new_lanes:
                    lane.fill(layer, shape, [_part(origins.get(seq), layer) for seq in lane.rows])
                for lane in ending:
                    lane.arrays[layer] = ()
        except BaseException:
            # Half of the layers have moved: what these sequences held is lost, and must not pass for whole.
            for seq in [seq for lane in ending for seq in lane.live]:
                self.leave(seq)
            raise
        for company, _, _ in plan:
            for seq in company:
                self.leave(seq)
        for lane in new_lanes:
            self._lanes |= dict.fromkeys(lane.live, lane)

    def _origin(self, seq: SequenceId) -> _Origin | None:
        lane = self._lanes.get(seq)
        return None if lane is None else (lane, lane.rows.index(seq), self._length(seq))


def _lane(company: Sequence[SequenceId], rows: int, capacity: int, layer_count: int) -> Lane:
    return Lane([*company, *[None] * (rows - len(company))], capacity, layer_count)


def _part(origin: _Origin | None, layer: int) -> Part:
    if origin is None:
        return ((), 0, 0)
    lane, row, length = origin
    return (lane.arrays[layer], row, length)


def _idle_rows_max(company: int) -> int:
    """Rows that a forward may compute for nobody. A row of a decode step costs little beside the weights, but it reads
    its positions, and among experts those of its own."""
    return max(1, company // 4)


def _rounded(tokens: int) -> int:
    return -(-tokens // _ROUND_TOKENS) * _ROUND_TOKENS
