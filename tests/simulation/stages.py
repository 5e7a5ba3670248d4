"""A pipeline of stages on a virtual clock: what each holds, what each step costs, and an error for any row that does
not continue its cache."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from hashlib import blake2b

from cluster.steps import (
    CacheVerb,
    Draw,
    Drawn,
    Drop,
    Honoured,
    StageMark,
    Step,
    StepDone,
    StepFailed,
    StepOutcome,
    Trim,
)
from cluster.types import SequenceId
from coordinator.admission import Room

END = 0
"""The token that ends an answer."""


def token_at(seed: int, position: int, draw: Draw) -> int:
    """What a sequence draws there: the same whatever else is computed, as with real engines."""
    noise = blake2b(f"{seed} {position}".encode(), digest_size=2).digest()
    token = noise[0] % 12
    return token if token not in draw.banned else 1 + noise[1] % 8


@dataclass(frozen=True, slots=True)
class Costs:
    """A stage's time for a step."""

    fixed_s: float = 0.01
    token_s: float = 0.001
    deep_s: float = 0.0  # for each token and thousand positions before it

    def of(self, step: Step) -> float:
        depth = sum(len(row.tokens) * row.start for row in step.rows) / 1000
        return self.fixed_s + self.token_s * step.token_count + self.deep_s * depth


@dataclass(frozen=True, slots=True)
class Hops:
    """What links take: into every stage and back, and a chunk's tokens between two stages, one after the other."""

    delay_s: float = 0.0
    token_s: float = 0.0


class Stages:
    """Steps go in in order and come out in order."""

    def __init__(
        self,
        room: Room,
        costs: Costs,
        rng: random.Random,
        *,
        failing: float = 0.0,
        forgetful: float = 0.0,
        jitter: float = 0.0,
        hops: Hops | None = None,
    ) -> None:
        self.room = room
        self._costs = costs
        self._rng = rng
        self._failing = failing
        self._forgetful = forgetful
        self._jitter = jitter
        self._caches: list[dict[SequenceId, int]] = [{} for _ in range(room.stages)]
        self._free_s = [0.0] * room.stages
        self._hops = hops or Hops()
        self._links_free_s = [0.0] * room.stages

    @property
    def held(self) -> dict[SequenceId, int]:
        """The most that any stage has of each sequence."""
        return {seq: max(stage.get(seq, 0) for stage in self._caches) for stage in self._caches for seq in stage}

    def run(self, step: Step, now: float) -> tuple[float, StepOutcome]:
        """What comes back, and when."""
        kept: dict[SequenceId, int] = {}
        failure: StepFailed | None = None
        marks = []
        for index, cache in enumerate(self._caches):
            self._obey(step.verbs, cache, kept)
            if failure is None and (wrong := self._trouble(step, cache)):
                blamed = (step.rows[0].seq,) if len(step.rows) == 1 else ()
                failure = StepFailed(step.id, index, wrong, blamed)
            if failure is None:
                cache.update({row.seq: row.end for row in step.rows})
                assert sum(cache.values()) <= self.room.kv_tokens, "more is cached than was promised"
                assert len(cache) <= self.room.sequences, "more sequences are cached than were promised"
            took_s = self._costs.of(step) * (1 + self._jitter * self._rng.random())
            came_s = self._cross(index, step, now)
            now = self._free_s[index] = max(came_s, self._free_s[index]) + took_s
            marks.append(StageMark(index, 0.0, max(0.0, now - took_s - came_s), took_s))
        now += self._hops.delay_s
        honoured = tuple(Honoured(seq, length) for seq, length in kept.items())
        if failure is not None:
            return now, replace(failure, honoured=honoured)
        drawn = tuple(
            Drawn(row.seq, row.end, token_at(row.draw.sampling.seed, row.end, row.draw))
            for row in step.rows
            if row.draw is not None
        )
        return now, StepDone(step.id, drawn, honoured, tuple(marks))

    def _cross(self, index: int, step: Step, now: float) -> float:
        """When the step has come to this stage."""
        if index:
            now = self._links_free_s[index] = (
                max(now, self._links_free_s[index]) + self._hops.token_s * step.token_count
            )
        return now + self._hops.delay_s

    def _obey(self, verbs: tuple[CacheVerb, ...], cache: dict[SequenceId, int], kept: dict[SequenceId, int]) -> None:
        for verb in verbs:
            match verb:
                case Drop(seq):
                    cache.pop(seq, None)
                case Trim(seq, length):
                    asked = min(length, cache.get(seq, 0))
                    cache[seq] = self._rng.randint(0, asked) if self._rng.random() < self._forgetful else asked
                    kept[seq] = min(cache[seq], kept.get(seq, length))
                case _:
                    raise AssertionError(f"this scheduler sends no {verb}")

    def _trouble(self, step: Step, cache: dict[SequenceId, int]) -> str:
        wrong = [row.seq for row in step.rows if row.start != cache.get(row.seq, 0)]
        if wrong:
            return f"{wrong} do not continue their cache"
        return "injected" if step.rows and self._rng.random() < self._failing else ""
