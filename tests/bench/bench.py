"""One form of the model under measurement: its arms, its stages by themselves, and what targets share.

Loads that several targets need are measured once and remembered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.cli.bench_measures import Load, Result
from tests.bench.arms import Arm, Place, cluster_arm
from tests.bench.cores import node_core
from tests.bench.hop_alone import hop_alone
from tests.bench.loads import IN_TOKENS, Effort, run_load
from tests.bench.model import Form
from tests.bench.stage_alone import Shot, StageProcess, passes_alone, stage_alone

ONE, TWO = "one node", "two nodes"
RPC, LLAMA, LLAMA_ONE = "llama.cpp RPC", "llama.cpp", "llama.cpp, one core"
"""Arms by name. Ours on one and two nodes; llama.cpp over two nodes, in one process with both cores, and on one."""

Passes = tuple[float, ...]

Timing = Callable[[Sequence[StageProcess], Shot], Passes]
"""How stages are timed: while the others rest, in turn with them, or while all compute."""


@dataclass(slots=True)
class Bench:
    """Arms that answer, and a memory of what was measured."""

    form: Form
    effort: Effort
    arms: Mapping[str, Arm]
    backend: str = "torch"
    _alone: dict[tuple[tuple[tuple[int, int], ...], Shot, Timing], Passes] = field(default_factory=dict)
    _loads: dict[Load, Mapping[str, list[Result]]] = field(default_factory=dict)
    _hops: dict[int, float] = field(default_factory=dict)

    def arm(self, name: str) -> Arm:
        return self.arms[name]

    def has(self, name: str) -> bool:
        return name in self.arms

    def load(self, users: int, *names: str) -> Mapping[str, list[Result]]:
        """The targets' load for so many users, on the arms of these names that there are."""
        load = Load(users, IN_TOKENS, self.effort.output_tokens, rounds=1)
        if load not in self._loads:
            arms = [self.arms[name] for name in names if self.has(name)]
            rounds = self.effort.rounds if users == 1 else self.effort.crowd_rounds
            self._loads[load] = run_load(arms, load, rounds)
        return self._loads[load]

    @property
    def decode_context(self) -> int:
        """Positions that a sequence of the targets' load has on average."""
        return IN_TOKENS + self.effort.output_tokens // 2

    def hops_s(self, arm: str, tokens: int = 1) -> float:
        """A step's hops by themselves: into the first stage and back without a boundary to carry, and over each
        boundary with so many tokens."""
        return 2 * self.hop_s() + (len(self.arm(arm).stages) - 1) * self.hop_s(tokens)

    def hop_s(self, tokens: int = 1) -> float:
        """One hop by itself, with a boundary of so many tokens."""
        width = int(self.arm(TWO).status()["plan"]["boundary_bytes"])
        if tokens not in self._hops:
            self._hops[tokens] = hop_alone(width * tokens)
        return self._hops[tokens]

    def passes(self, arm: str, shot: Shot, timed: Timing = passes_alone) -> Passes:
        """The pass of each of the arm's stages by itself."""
        return self.measure_alone(arm, [shot], timed)[0]

    def measure_alone(self, arm: str, shots: Sequence[Shot], timed: Timing = passes_alone) -> list[Passes]:
        """Several at once, as loading a stage costs more than timing it."""
        cuts = self.arm(arm).stages
        keys = [(cuts, shot, timed) for shot in shots]
        if any(key not in self._alone for key in keys):
            with contextlib.ExitStack() as stack:
                stages = [
                    stack.enter_context(stage_alone(self.form, cut, node_core(index), backend=self.backend))
                    for index, cut in enumerate(cuts)
                ]
                for key in keys:
                    self._alone[key] = self._alone.get(key) or timed(stages, key[1])
        return [self._alone[key] for key in keys]

    def shot(self, rows: int, context: int | None = None, tokens: int = 1) -> Shot:
        return Shot(rows, self.decode_context if context is None else context, tokens, self.effort.pass_seconds)


@contextlib.contextmanager
def bench_of(
    form: Form, effort: Effort, state: Path, *, backend: str, others: Mapping[str, Arm] | None = None
) -> Iterator[Bench]:
    """Our arms on one and on two nodes, beside `others`; all stay up, so that loads can be interleaved."""
    with contextlib.ExitStack() as stack:
        arms = {
            name: stack.enter_context(cluster_arm(name, form, [Place()] * nodes, state, backend=backend))
            for name, nodes in ((ONE, 1), (TWO, 2))
        }
        yield Bench(form, effort, {**arms, **(others or {})}, backend)
