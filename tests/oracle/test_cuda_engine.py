"""On a card: compiled kernels and CUDA graphs against the whole model. The one file that needs a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.limits import RECORDED_BYTES_MAX
from node.engine import Engine
from node.engines.torch.captured import RECORDED_ROWS_MAX, means_of
from node.engines.torch.engine import TorchEngine
from node.engines.torch.ragged import Ragged
from node.engines.torch.recording import GraphRecorder
from tests.oracle.pipelines import (
    close_pipeline,
    greedy,
    load_pipeline,
    ragged,
    row,
    run_prefill,
    run_step,
    stage_specs,
)
from tests.oracle.ragged_cases import distance
from tests.oracle.reference import Reference, WholeModel, assert_same, random_prompt
from tests.oracle.test_captured import RECORDED
from tests.oracle.test_ragged import CASES, TOLERANCE

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA or AMD GPU that torch can use: run `pytest -k cuda` there", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")  # what libraries say on cards is not known yet

DEVICE = "cuda:0"
ON_CUDA_TOLERANCE = 2e-3
"""Of float32 logits: a card sums in another order than the processor that the reference was computed on."""

Checkpoints = Callable[[str], Path]
References = Callable[..., Reference]


def pipeline(folder: Path, cuts: Sequence[int] = ()) -> list[Engine]:
    specs = stage_specs(folder, cuts, device=DEVICE)
    return load_pipeline([TorchEngine] * len(specs), specs)


def assert_recorded(engines: Sequence[Engine]) -> None:
    """Nothing was found at load, or later, that cannot be recorded."""
    for engine in engines:
        steps = engine._stage.decoding  # type: ignore[attr-defined]
        assert steps is not None
        assert steps._recorded_rows_max == RECORDED_ROWS_MAX
        assert isinstance(steps._recorder, GraphRecorder)
        assert 0 < steps._recorder._taken_bytes <= RECORDED_BYTES_MAX


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_equal_attention_row_by_row(name: str) -> None:
    from node.engines.torch import ragged_kernels

    case = replace(CASES[name], device=DEVICE)
    for programs in (1, 4 * torch.cuda.get_device_properties(0).multi_processor_count):
        with torch.cuda.device(DEVICE):
            assert distance(case, Ragged(ragged_kernels, programs)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("cuts", [(), (2, 4)])
@pytest.mark.parametrize("family", RECORDED)
def test_graphs_equal_the_whole_model(
    family: str, cuts: tuple[int, ...], checkpoint: Checkpoints, reference: References
) -> None:
    expected = reference(family)
    engines = pipeline(checkpoint(family), cuts)
    assert_same(*greedy(engines, expected.prompt, len(expected.ids)), expected, tolerance=ON_CUDA_TOLERANCE)
    if family != "gpt_oss":  # whether its experts wait for the device is the library's affair
        assert_recorded(engines)
    close_pipeline(engines)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sequences_join_and_leave_graphs(family: str, checkpoint: Checkpoints, reference: References) -> None:
    expected = [reference(family, prompt_tokens) for prompt_tokens in (5, 23, 40)]
    engines = pipeline(checkpoint(family), (3,))
    found = ragged(engines, [answer.prompt for answer in expected], len(expected[0].ids))
    for (ids, logits), answer in zip(found, expected, strict=True):
        assert_same(ids, logits, answer, tolerance=ON_CUDA_TOLERANCE)
    assert_recorded(engines)
    close_pipeline(engines)


def test_graphs_of_all_numbers_of_rows_share_their_memory(
    checkpoint: Checkpoints, whole_model: Callable[[str], WholeModel]
) -> None:
    """From one row to sixteen and back, each time over records made in between."""
    (engine,) = pipeline(checkpoint("llama"))
    prompts = [random_prompt(5 + seq, seed=seq) for seq in range(16)]
    for seq, prompt in enumerate(prompts):
        run_prefill([engine], prompt, seq=seq)
    done = [list(prompt) for prompt in prompts]
    for count in (1, 2, 4, 8, 16, 8, 4, 2, 1):
        found = run_step([engine], [row(seq, len(done[seq]), [8]) for seq in range(count)])
        for seq in range(count):
            done[seq].append(8)
            np.testing.assert_allclose(
                found[seq], whole_model("llama").logits(done[seq])[-1], rtol=0, atol=ON_CUDA_TOLERANCE
            )
    assert_recorded([engine])
    close_pipeline([engine])


def test_a_step_that_reads_a_value_is_refused_and_the_next_is_recorded() -> None:
    means = means_of(torch.device(DEVICE))
    assert means is not None
    x = torch.ones(4, device=DEVICE)
    with pytest.raises(RuntimeError):
        means.recorder.record(lambda: (x * float(x.sum()),))
    again = means.recorder.record(lambda: (x * 2,))
    x.fill_(3.0)
    assert again()[0].tolist() == [6.0] * 4
