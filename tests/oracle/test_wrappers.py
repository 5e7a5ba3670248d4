"""Vision-language checkpoints load their text part: every wrapper that is supported, as transformers saves it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.models import wrappers
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.models.layout import owned_tensors
from cluster.types import Backend, LayerRange
from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from node.engines.torch.reference import trace_whole_model
from node.hardware import detect_devices
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import load_pipeline, run_prefill, stage_specs
from tests.oracle.reference import WholeModel, random_prompt
from tests.wrappers import WRAPPED, flatten, wrap

Checkpoints = Callable[[str], Path]
PROMPT = random_prompt(40, seed=1)
MAKERS = pytest.mark.parametrize("makers", [(TorchEngine, MlxEngine), (MlxEngine, TorchEngine)])


@pytest.fixture(scope="module")
def wrapped(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    @cache
    def make(wrapper: str) -> Path:
        return wrap(wrapper, checkpoint(WRAPPED[wrapper]), tmp_path_factory.mktemp("wrapped") / wrapper)

    return make


def test_every_wrapper_is_tested() -> None:
    assert set(wrappers.WRAPPERS) == set(WRAPPED)


@MAKERS
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_the_text_part_is_run(
    wrapper: str,
    makers: tuple[Callable[[], Engine], ...],
    wrapped: Checkpoints,
    whole_model: Callable[[str], WholeModel],
) -> None:
    engines = load_pipeline(makers, stage_specs(wrapped(wrapper), (3,)))
    expected = whole_model(WRAPPED[wrapper]).logits(PROMPT)[-1]
    np.testing.assert_allclose(run_prefill(engines, PROMPT, (13,)), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_vision_costs_nothing(wrapper: str, checkpoint: Checkpoints, wrapped: Checkpoints) -> None:
    text, whole = (open_checkpoint(folder) for folder in (checkpoint(WRAPPED[wrapper]), wrapped(wrapper)))
    expected, found = read_facts(text), read_facts(whole)
    assert len(whole.tensors) > len(text.tensors) or wrapper == "qwen3_5_moe"  # its experts are stacked there
    for one, other in zip(expected.layers, found.layers, strict=True):
        assert one == other
    assert expected.stored_bytes == found.stored_bytes
    every_layer = LayerRange(0, found.layer_count)
    owned = owned_tensors(whole, every_layer, found.layer_count)
    assert sum(tensor.size_bytes for tensor in owned) == found.stored_bytes


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_verify_has_a_reference(wrapper: str, wrapped: Checkpoints, whole_model: Callable[[str], WholeModel]) -> None:
    facts = read_facts(open_checkpoint(wrapped(wrapper)))
    trace = trace_whole_model(wrapped(wrapper), facts, tuple(PROMPT), detect_devices(Backend.TORCH, "cpu")[0])
    expected = whole_model(WRAPPED[wrapper]).logits(PROMPT)[-len(trace.logits) :]
    np.testing.assert_allclose(trace.logits, expected, rtol=0, atol=TOLERANCE)
    assert len(trace.hidden) == facts.layer_count + 1


@MAKERS
def test_mistral_3_holds_one_of_two_text_models(
    makers: tuple[Callable[[], Engine], ...],
    checkpoint: Checkpoints,
    whole_model: Callable[[str], WholeModel],
    tmp_path: Path,
) -> None:
    """Ministral's is the other one."""
    engines = load_pipeline(makers, stage_specs(wrap("mistral3", checkpoint("ministral3"), tmp_path), (3,)))
    expected = whole_model("ministral3").logits(PROMPT)[-1]
    np.testing.assert_allclose(run_prefill(engines, PROMPT), expected, rtol=0, atol=TOLERANCE)


@MAKERS
def test_settings_of_text_may_lie_beside_those_of_vision(
    makers: tuple[Callable[[], Engine], ...],
    checkpoint: Checkpoints,
    whole_model: Callable[[str], WholeModel],
    tmp_path: Path,
) -> None:
    """Qwen2.5-VL as it was published."""
    folder = wrap("qwen2_5_vl", checkpoint("qwen2"), tmp_path)
    flatten(folder)
    engines = load_pipeline(makers, stage_specs(folder, (3,)))
    expected = whole_model("qwen2").logits(PROMPT)[-1]
    np.testing.assert_allclose(run_prefill(engines, PROMPT), expected, rtol=0, atol=TOLERANCE)
