"""Steps that fail on the last stage while the first has gone on: the answer stays what it would have been, and stages
that forget go back as far as they must."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.frames import Frame, Outcome
from cluster.limits import STEP_TOKENS_MAX
from cluster.plan import Fence
from cluster.rewinding import WaysBack
from cluster.steps import Boundary, Row, Sampling
from cluster.types import DeploymentId, Epoch, SequenceId
from coordinator.admission import Room
from coordinator.events import SequenceFailed, TokenDrawn
from coordinator.pacing import Pace
from coordinator.prefix_cache import PrefixCache
from coordinator.scheduler import Scheduler
from coordinator.sequence import SequenceAsk
from node.stage import StageRunner
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import Compute, load_pipeline, stage_specs, wrap_steps
from tests.oracle.reference import Reference, WholeModel, decisive_reference
from tests.oracle.test_mixed import MLX_TORCH, TORCH_MLX, Makers

FENCE = Fence(DeploymentId("d"), Epoch(1))
CONTEXT = 512
LENGTHS = (330, 290)


class Unhurried(Pace):
    """Steps are filled up to their budget in the order of arrival, however long they take."""

    @property
    def token_s(self) -> float:
        return 0.0

    def beside_answers(self, share: int, rows: int, prompts: Sequence[int], answers: int) -> int:
        return STEP_TOKENS_MAX

    def alone(self, tokens_left: int) -> int:
        return STEP_TOKENS_MAX


class Pipeline:
    """Two stages and the scheduler, in one process. The first stage computes every step as soon as it is dispatched,
    the second one only when no other may be, so that the first is ahead."""

    def __init__(self, makers: Makers, folder: Path, budget: int, failing: Sequence[int]) -> None:
        specs = stage_specs(folder, (3,), kv_tokens=4 * CONTEXT, context_tokens=CONTEXT)
        engines = load_pipeline(makers, specs)
        wrap_steps(engines[1], lambda compute: self._failing(compute, failing))
        self.stages = [StageRunner(engine, stage=i, is_last=i == 1) for i, engine in enumerate(engines)]
        room = Room(2, 4 * CONTEXT, CONTEXT)
        prefixes = PrefixCache(room, enabled=False)
        self.scheduler = Scheduler(room, budget_tokens=budget, pace=Unhurried(2), prefixes=prefixes)
        self.kept: list[int] = []  # by every trim, on the stage that kept the least

    @staticmethod
    def _failing(compute: Compute, failing: Sequence[int]) -> Compute:
        """Some of the engine's steps fail, counted from 0 among those with several rows: one that fails alone is to
        blame, and is not tried again."""
        shared = 0

        def step(rows: Sequence[Row], inputs: Boundary | None) -> object:
            nonlocal shared
            shared += len(rows) > 1
            if len(rows) > 1 and shared - 1 in failing:
                raise MemoryError
            return compute(rows, inputs)

        return step

    def answer(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        greedy = Sampling(seed=0, temperature=0.0)
        self.scheduler.submit(
            [SequenceAsk(SequenceId(i), tuple(prompt), greedy, count) for i, prompt in enumerate(prompts)],
            0.0,
        )
        drawn: list[list[int]] = [[] for _ in prompts]
        under_way: deque[Frame] = deque()
        while True:
            while (step := self.scheduler.next_step(0.0)) is not None:
                passed = self.stages[0].run(Frame(FENCE, step), receive_s=0.0, queue_s=0.0)
                assert isinstance(passed, Frame)
                under_way.append(passed)
            if not under_way:
                return drawn
            outcome = self.stages[1].run(under_way.popleft(), receive_s=0.0, queue_s=0.0)
            assert isinstance(outcome, Outcome)
            self.kept += [kept.length for kept in outcome.result.honoured]
            for event in self.scheduler.complete(outcome.result, 0.0):
                assert not isinstance(event, SequenceFailed), event.reason
                if isinstance(event, TokenDrawn):
                    drawn[event.seq].append(event.token)


@pytest.fixture(scope="module")
def answers(whole_model: Callable[[str], WholeModel]) -> Callable[[str], list[Reference]]:
    def make(family: str) -> list[Reference]:
        return [
            decisive_reference(whole_model(family), prompt_tokens=length, count=32, tolerance=TOLERANCE)
            for length in LENGTHS
        ]

    return make


def check(pipeline: Pipeline, expected: Sequence[Reference]) -> None:
    found = pipeline.answer([answer.prompt for answer in expected], 32)
    np.testing.assert_array_equal(found, [answer.ids for answer in expected])
    assert all(stage.capacity.sequences == 0 for stage in pipeline.stages), "dropped sequences hold no cache"


@pytest.mark.parametrize("makers", [TORCH_MLX, MLX_TORCH], ids=["torch-mlx", "mlx-torch"])
@pytest.mark.parametrize(
    ("family", "budget", "failing", "kept"),
    [
        ("llama", 40, (0, 3), [320, 0, 332, 238]),  # as asked
        ("gemma3", 25, (0, 3), [325, 0, 332, 148]),  # the first stage was ahead by fewer positions than it keeps
        ("gemma3", 100, (1,), [330, 0, 0]),  # and here by more: a prompt is computed again from its start
        ("qwen3_next", 40, (0, 3), [280, 0, 280, 280, 0, 280, 0]),  # the first to its snapshot, then all to that
        ("lfm2", 100, (1,), [300, 0, 300, 0]),
    ],
)
def test_answers_survive_failed_steps(
    family: str,
    budget: int,
    failing: Sequence[int],
    kept: list[int],
    makers: Makers,
    checkpoint: Callable[[str], Path],
    answers: Callable[[str], list[Reference]],
) -> None:
    """Two prompts, of 330 and 290 tokens. The first failure comes where one ends and the other begins."""
    pipeline = Pipeline(makers, checkpoint(family), budget, failing)
    check(pipeline, answers(family))
    assert pipeline.kept == kept


@pytest.mark.parametrize("family", ["gemma3", "lfm2"])
def test_stages_that_pretend_to_go_back_anywhere_fail_the_check(
    family: str,
    checkpoint: Callable[[str], Path],
    answers: Callable[[str], list[Reference]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WaysBack, "honoured", lambda self, length, asked: min(length, asked))
    with pytest.raises(AssertionError):
        check(Pipeline(TORCH_MLX, checkpoint(family), 100, (1,)), answers(family))
