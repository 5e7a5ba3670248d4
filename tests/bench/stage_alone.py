"""A stage's pass by itself: the plan's slice in a process on one core, no wire, no scheduler, no neighbour's wait.

The process is told in JSON lines what to time and answers in JSON lines; `StageProcess` is the parent's end of it.
Usage of the child: python -m tests.bench.stage_alone BACKEND FOLDER BITS DEVICE FIRST LAST (BITS 0: as stored).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cluster.errors import ClusterError
from cluster.frames import Frame
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import ModelFacts, read_facts
from cluster.plan import Fence
from cluster.steps import Boundary, Draw, Drop, Row, Sampling, Step, StepFailed
from cluster.types import Backend, DeploymentId, Epoch, HostTensor, LayerRange, SequenceId, StepId
from node.engine import StageSpec
from node.engines.registry import create_engine
from node.stage import StageRunner
from tests.bench.cores import pinned
from tests.bench.model import Form, model_folder

_PASSES_MIN = 3
_KV_TOKENS, _CONTEXT = 20_480, 5120


@dataclass(frozen=True, slots=True)
class Shot:
    """What is timed: `rows` sequences that already have `context` positions get `tokens` new ones each. The stage rests
    for `rest_s` before each pass, as it does where one step is in flight: a core that has slept computes slower."""

    rows: int
    context: int
    tokens: int = 1
    seconds: float = 1.5  # passes are repeated for so long, rests left out
    rest_s: float = 0.0


class StageProcess:
    """A loaded stage in a process of its own."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def begin(self, shot: Shot) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(asdict(shot)) + "\n")
        self._child.stdin.flush()

    def result(self) -> Mapping[str, float]:
        """`seconds` of the median pass, `cpu` of its processor time."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise ClusterError(f"a stage measured alone ended with {self._child.wait()}")
        found: Mapping[str, float] = json.loads(line)
        return found


@contextlib.contextmanager
def stage_alone(
    form: Form, layers: tuple[int, int], core: int, *, backend: str = "torch", device: str = "cpu"
) -> Iterator[StageProcess]:
    """The slice [first, last), loaded on `core`."""
    command = [*pinned([core]), sys.executable, "-m", "tests.bench.stage_alone"]
    command += [backend, str(model_folder(form.shape)), str(form.bits or 0), device, *map(str, layers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            process = StageProcess(child)
            process.result()  # it says when it has loaded
            yield process
        finally:
            child.kill()


def passes_alone(stages: Sequence[StageProcess], shot: Shot) -> tuple[float, ...]:
    """Each stage's pass while the others rest."""
    found = []
    for stage in stages:
        stage.begin(shot)
        found.append(stage.result()["seconds"])
    return tuple(found)


def passes_in_turn(stages: Sequence[StageProcess], shot: Shot) -> tuple[float, ...]:
    """Each stage's pass where it rests while the others compute theirs."""
    alone = passes_alone(stages, shot)
    return tuple(
        passes_alone([stage], replace(shot, rest_s=sum(alone) - own))[0]
        for stage, own in zip(stages, alone, strict=True)
    )


def passes_together(stages: Sequence[StageProcess], shot: Shot) -> tuple[float, ...]:
    """Each stage's pass while all compute."""
    for stage in stages:
        stage.begin(shot)
    return tuple(stage.result()["seconds"] for stage in stages)


# -- The child -------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    backend, folder, bits, device, first, last = arguments
    facts = read_facts(open_checkpoint(Path(folder)), int(bits) or None)
    layers = LayerRange(int(first), int(last))
    engine = create_engine(Backend(backend))
    spec = StageSpec(
        folder=Path(folder),
        layers=layers,
        layer_count=facts.layer_count,
        boundary=facts.boundary,
        device=device,
        threads=1,
        kv_tokens=_KV_TOKENS,
        context_tokens=_CONTEXT,
        bits=facts.bits,
    )
    engine.load(spec, lambda progress: None)
    timer = _Timer(StageRunner(engine, stage=0, is_last=spec.is_last), facts, is_first=spec.is_first)
    _say({"loaded": 1.0})
    for line in sys.stdin:
        _say(timer.time(Shot(**json.loads(line))))


class _Timer:
    def __init__(self, runner: StageRunner, facts: ModelFacts, *, is_first: bool) -> None:
        self._runner = runner
        self._facts = facts
        self._is_first = is_first
        self._steps = 0
        self._random = np.random.default_rng(0)

    def time(self, shot: Shot) -> Mapping[str, float]:
        """Passes that follow one another as decoding steps do; a prompt's chunk is dropped and computed again."""
        walls: list[float] = []
        cpus: list[float] = []
        seqs = [SequenceId(1 + index) for index in range(shot.rows)]
        length = self._fill(seqs, shot.context)
        until_s = time.perf_counter() + shot.seconds
        while time.perf_counter() < until_s + len(walls) * shot.rest_s or len(walls) < _PASSES_MIN:
            if shot.tokens > 1 and walls:
                self._run([], drop=seqs)
                length = self._fill(seqs, shot.context)
            rows = [self._row(seq, length, shot.tokens) for seq in seqs]
            tensors = self._tensors(rows)
            if shot.rest_s:
                time.sleep(shot.rest_s)
            cpu_s, began_s = time.process_time(), time.perf_counter()
            self._run(rows, tensors)
            walls.append(time.perf_counter() - began_s)
            cpus.append(time.process_time() - cpu_s)
            length += shot.tokens
        self._run([], drop=seqs)
        return {"seconds": median(walls), "cpu": median(cpus), "passes": float(len(walls))}

    def _fill(self, seqs: Sequence[SequenceId], context: int) -> int:
        """Give each sequence `context` positions."""
        bounds = [*range(0, context, 512), context]
        for seq in seqs:
            for start, end in pairwise(bounds):
                rows = [self._row(seq, start, end - start)]
                self._run(rows, self._tensors(rows))
        return context

    def _row(self, seq: SequenceId, start: int, tokens: int) -> Row:
        draw = Draw(sampling=Sampling(seed=0, temperature=0.0), prompt_tokens=0)
        ids = self._random.integers(1000, self._facts.vocab_size, tokens)
        return Row(seq=seq, start=start, tokens=tuple(int(id) for id in ids), draw=draw)

    def _tensors(self, rows: Sequence[Row]) -> Boundary:
        """What a stage before this one would send: noise of the right size."""
        if self._is_first:
            return ()
        tokens = sum(len(row.tokens) for row in rows)
        return tuple(
            HostTensor(spec.dtype, (tokens, *spec.shape), _noise(self._random, tokens * spec.token_bytes))
            for spec in self._facts.boundary
        )

    def _run(self, rows: Sequence[Row], tensors: Boundary = (), *, drop: Sequence[SequenceId] = ()) -> None:
        self._steps += 1
        step = Step(StepId(self._steps), tuple(Drop(seq) for seq in drop), tuple(rows))
        frame = Frame(Fence(DeploymentId("bench"), Epoch(1)), step, tensors=tensors)
        done = self._runner.run(frame, receive_s=0.0, queue_s=0.0)
        failure = done.failure if isinstance(done, Frame) else done.result
        if isinstance(failure, StepFailed):
            raise ClusterError(f"a pass measured alone failed: {failure.reason}")


def _noise(random: np.random.Generator, size: int) -> Any:
    """bf16 numbers around one: halves of random sign and mantissa."""
    halves = random.integers(0, 1 << 16, size // 2, dtype=np.uint16)
    return ((halves & 0x807F) | 0x3F00).tobytes()


def _say(value: Mapping[str, float]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
