"""Boundaries of more than one tensor, and layers that no boundary may part: the small Gemma 4 on both engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ModelError
from cluster.steps import Boundary
from cluster.types import LayerRange
from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from tests.checkpoints import make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import load_pipeline, row, run_prefill, stage_specs
from tests.oracle.reference import Reference, WholeModel, random_prompt
from tests.oracle.test_torch_load import copied

Checkpoints = Callable[[str], Path]
References = Callable[..., Reference]
ENGINES = pytest.mark.parametrize("make", [TorchEngine, MlxEngine])
PROMPT = random_prompt(12, seed=1)


@ENGINES
def test_a_stage_passes_on_the_inputs_of_all_layers_as_they_came(
    make: Callable[[], Engine], checkpoint: Checkpoints
) -> None:
    first, second, _ = load_pipeline([make] * 3, stage_specs(checkpoint("gemma4_small"), (2, 4)))
    step = [row(1, 0, PROMPT)]
    made = first.step(step, None)
    assert isinstance(made, tuple)
    passed = second.step(step, made)
    assert isinstance(passed, tuple)
    assert [tensor.shape for tensor in passed] == [(12, 64), (12, 8, 24)]
    assert bytes(passed[1].data) == bytes(made[1].data)
    assert bytes(passed[0].data) != bytes(made[0].data)


def test_both_engines_make_the_same_inputs(checkpoint: Checkpoints) -> None:
    spec = stage_specs(checkpoint("gemma4_small"), (2,))[0]
    made = []
    for make in (TorchEngine, MlxEngine):
        (engine,) = load_pipeline([make], [spec])
        boundary = engine.step([row(1, 0, PROMPT)], None)
        assert isinstance(boundary, tuple)
        made.append(np.frombuffer(boundary[1].data, np.float32))
    np.testing.assert_allclose(made[0], made[1], rtol=0, atol=1e-5)
    assert np.abs(made[0]).max() > 1


@ENGINES
def test_half_of_a_boundary_is_refused(make: Callable[[], Engine], checkpoint: Checkpoints) -> None:
    """And a step that was refused has changed nothing."""
    first, last = load_pipeline([make] * 2, stage_specs(checkpoint("gemma4_small"), (3,)))
    boundary = first.step([row(1, 0, PROMPT)], None)
    assert isinstance(boundary, tuple)
    halves: tuple[Boundary, ...] = (boundary[:1], boundary[1:], boundary[::-1])
    for half in halves:
        with pytest.raises(ValueError, match="expected boundary tensors"):
            last.step([row(1, 0, PROMPT)], half)
    assert last.length(row(1, 0, ()).seq) == 0


@ENGINES
def test_a_plan_with_another_boundary_is_refused(make: Callable[[], Engine], checkpoint: Checkpoints) -> None:
    spec = stage_specs(checkpoint("gemma4_small"), (3,))[1]
    with pytest.raises(ModelError, match="the plan's boundary is"):
        make().load(replace(spec, boundary=spec.boundary[:1]), lambda progress: None)


@ENGINES
def test_layers_parted_from_the_keys_that_they_share_are_refused(
    make: Callable[[], Engine], checkpoint: Checkpoints
) -> None:
    spec = stage_specs(checkpoint("gemma4_small"), (3,))[1]
    with pytest.raises(ModelError, match=r"must not part them|cannot be computed on their own"):
        make().load(replace(spec, layers=LayerRange(5, 8)), lambda progress: None)


@ENGINES
def test_keys_that_are_stored_and_not_used_do_no_harm(
    make: Callable[[], Engine], checkpoint: Checkpoints, reference: References, tmp_path: Path
) -> None:
    """As published: layers that share the keys of others have some of their own in the files."""
    expected = reference("gemma4_small")
    folder = copied(checkpoint("gemma4_small"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in [
        name for name in tensors if name.startswith(("model.layers.4.self_attn.k_", "model.layers.4.self_attn.v_"))
    ]:
        tensors[name.replace(".4.", ".6.")] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    engines = load_pipeline([make] * 2, stage_specs(folder, (3,)))
    np.testing.assert_allclose(run_prefill(engines, expected.prompt), expected.logits[0], rtol=0, atol=TOLERANCE)


@ENGINES
def test_wide_heads_are_stated_in_either_spelling(
    make: Callable[[], Engine], checkpoint: Checkpoints, reference: References, tmp_path: Path
) -> None:
    """As published, for all layers that see everything; the checkpoints of other tests state them by layer."""
    expected = reference("gemma4")
    stated = {"per_layer_config": ..., "global_head_dim": 32, "num_global_key_value_heads": 1}
    engines = load_pipeline([make] * 2, stage_specs(copied(checkpoint("gemma4"), tmp_path, **stated), (3,)))
    np.testing.assert_allclose(run_prefill(engines, expected.prompt), expected.logits[0], rtol=0, atol=TOLERANCE)


@ENGINES
def test_layers_are_counted_with_two_digits(make: Callable[[], Engine], tmp_path: Path) -> None:
    """transformers then writes `02` for layer 2 where it states heads by layer."""
    folder = make_checkpoint("gemma4", tmp_path, layers=12)
    assert '"02": {' in (folder / "config.json").read_text()
    engines = load_pipeline([make] * 2, stage_specs(folder, (5,)))
    expected = WholeModel(folder).logits(PROMPT)[-1]
    np.testing.assert_allclose(run_prefill(engines, PROMPT), expected, rtol=0, atol=TOLERANCE)
