"""Pipelines of torch and MLX stages compute what the whole model computes, and draw the same sampled text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.steps import Draw, Sampling
from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from node.sampling import draw
from tests.checkpoints import FAMILIES
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import Vector, greedy, load_pipeline, ragged, row, stage_specs
from tests.oracle.reference import Reference, assert_same, random_prompt

Makers = tuple[Callable[[], Engine], ...]
Checkpoints = Callable[[str], Path]
References = Callable[..., Reference]

TORCH_MLX: Makers = (TorchEngine, MlxEngine)
MLX_TORCH: Makers = (MlxEngine, TorchEngine)
TORCH_MLX_TORCH: Makers = (TorchEngine, MlxEngine, TorchEngine)
MLX_TORCH_MLX: Makers = (MlxEngine, TorchEngine, MlxEngine)
MIXED = [
    pytest.param(TORCH_MLX, id="torch-mlx"),
    pytest.param(MLX_TORCH, id="mlx-torch"),
    pytest.param(TORCH_MLX_TORCH, id="torch-mlx-torch"),
    pytest.param(MLX_TORCH_MLX, id="mlx-torch-mlx"),
]

CUTS = {1: (), 2: (3,), 3: (2, 4)}  # of six layers, by the number of stages


def pipeline(makers: Makers, folder: Path) -> list[Engine]:
    return load_pipeline(makers, stage_specs(folder, CUTS[len(makers)]))


def assert_equal(ids: Sequence[int], logits: np.ndarray, reference: Reference) -> None:
    assert_same(ids, logits, reference, tolerance=TOLERANCE)


@pytest.mark.parametrize("makers", MIXED)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_and_logits_equal_the_whole_model(
    family: str, makers: Makers, checkpoint: Checkpoints, reference: References
) -> None:
    expected = reference(family)
    engines = pipeline(makers, checkpoint(family))
    assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)


@pytest.mark.parametrize("makers", MIXED[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_prefill_cut_gives_the_same_logits(
    family: str, makers: Makers, checkpoint: Checkpoints, reference: References
) -> None:
    expected = reference(family)
    engines = pipeline(makers, checkpoint(family))
    for cut in range(1, len(expected.prompt)):
        assert_equal(*greedy(engines, expected.prompt, 2, chunks=(cut,), seq=cut), expected)
        for engine in engines:
            engine.drop(row(cut, 0, ()).seq)


@pytest.mark.parametrize("makers", MIXED)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_ragged_batch_do_not_see_each_other(
    family: str, makers: Makers, checkpoint: Checkpoints, reference: References
) -> None:
    expected = [reference(family, prompt_tokens) for prompt_tokens in (5, 23, 40)]
    found = ragged(pipeline(makers, checkpoint(family)), [answer.prompt for answer in expected], len(expected[0].ids))
    for (ids, logits), answer in zip(found, expected, strict=True):
        assert_equal(ids, logits, answer)


@pytest.mark.parametrize("makers", MIXED[:2])
def test_a_pipeline_that_skips_a_stage_fails_the_check(
    makers: Makers, checkpoint: Checkpoints, reference: References
) -> None:
    """The boundaries look alike everywhere, so only the answer can tell."""
    expected = reference("llama")
    specs = stage_specs(checkpoint("llama"), (2, 4))
    engines = load_pipeline(makers, (specs[0], specs[2]))
    with pytest.raises(AssertionError):
        assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_is_the_same_from_every_mixture_alone_and_in_a_batch(family: str, checkpoint: Checkpoints) -> None:
    """Warm enough that the likeliest token often loses, and different from seed to seed."""
    prompts = [random_prompt(length, seed=length) for length in (12, 30, 7)]
    texts = []
    for makers in ((TorchEngine,), (MlxEngine,), TORCH_MLX, MLX_TORCH):
        engines = pipeline(makers, checkpoint(family))
        texts.append([ids for ids, _ in ragged(engines, prompts, 32, _sampler(seed=1))])
        _drop_all(engines)
        alone, _ = ragged(engines, prompts[:1], 32, _sampler(seed=1), chunk=64)[0]
        assert alone == texts[-1][0]
    assert all(text == texts[0] for text in texts)
    engine = pipeline((TorchEngine,), checkpoint(family))
    assert [ids for ids, _ in ragged(engine, prompts, 32, _sampler(seed=2))] != texts[0]
    _drop_all(engine)
    assert [ids for ids, _ in ragged(engine, prompts, 32)] != texts[0]


def _sampler(seed: int) -> Callable[[Vector, list[int]], int]:
    sampling = Sampling(seed=seed, temperature=8.0, top_k=40, top_p=0.95, frequency_penalty=0.5)
    return lambda logits, tokens: draw(logits, Draw(sampling, prompt_tokens=0), tokens)


def _drop_all(engines: Sequence[Engine]) -> None:
    for engine in engines:
        for seq in range(3):
            engine.drop(row(seq, 0, ()).seq)
