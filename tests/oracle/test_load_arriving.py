"""An engine loads while its weights arrive: it waits for each tensor before it reads it, whatever a family's library
does with the tensors on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [torch]")

from cluster.errors import NodeLost
from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.types import Backend
from node.engine import Engine, StageSpec, everything_is_here
from node.engines.registry import create_engine
from tests.checkpoints import FAMILIES, MORE_FAMILIES, STATE_FAMILIES, make_checkpoint
from tests.eight_bit_checkpoints import eight_bits
from tests.integer_checkpoints import quantised_checkpoint
from tests.integration.live import has_backend
from tests.oracle.pipelines import Vector, close_pipeline, load_pipeline, run_prefill, stage_specs
from tests.oracle.reference import random_prompt

Checkpoints = Callable[[str], Path]

_PROMPT = random_prompt(24, seed=5)

_BOTH = (*FAMILIES, *MORE_FAMILIES, *STATE_FAMILIES)
_CASES = [(Backend.TORCH, family) for family in _BOTH]
_CASES += [(Backend.MLX, family) for family in _BOTH] if has_backend("mlx") else []


class _Hollow:
    """A folder whose tensors' bytes come when they are waited for, and not before."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        self._source = source
        self._tensors = open_checkpoint(source).tensors
        self.came: set[str] = set()
        shutil.copytree(source, folder)
        for path in folder.glob("*.safetensors"):
            size_bytes = path.stat().st_size
            with path.open("r+b") as file:
                file.truncate(min(tensor.begin for tensor in self._tensors.values() if tensor.file == path.name))
                file.truncate(size_bytes)

    def bring(self, names: Iterable[str]) -> None:
        for tensor in (self._tensors[name] for name in set(names) - self.came):
            with (self._source / tensor.file).open("rb") as source, (self.folder / tensor.file).open("r+b") as file:
                source.seek(tensor.begin)
                file.seek(tensor.begin)
                file.write(source.read(tensor.size_bytes))
            self.came.add(tensor.name)


def _logits(backend: Backend, specs: list[StageSpec]) -> Vector:
    engines: list[Engine] = load_pipeline([lambda: create_engine(backend)] * len(specs), specs)
    try:
        return run_prefill(engines, _PROMPT)
    finally:
        close_pipeline(engines)


@pytest.mark.parametrize(("backend", "family"), _CASES, ids=lambda value: str(value))
def test_what_arrives_during_the_load_computes_the_same(
    backend: Backend, family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    _assert_the_same(backend, checkpoint(family), tmp_path)


@pytest.mark.skipif(not has_backend("mlx"), reason="the checkpoints are made with mlx-lm: the extra [mlx]")
@pytest.mark.parametrize("backend", sorted({backend for backend, _ in _CASES}))
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_packed_weights_that_arrive_during_the_load_compute_the_same(
    backend: Backend, family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    from tests.converted import convert

    _assert_the_same(backend, convert(checkpoint(family), tmp_path / "packed", bits=4), tmp_path)


@pytest.mark.parametrize("backend", sorted({backend for backend, _ in _CASES}))
@pytest.mark.parametrize("layout", ["awq", "gptq_act_order", "compressed"])
def test_weights_that_are_repacked_while_they_arrive_compute_the_same(
    backend: Backend, layout: str, tmp_path: Path
) -> None:
    """What no engine computes with, such as a matrix' shape in numbers, is a part of the stage all the same."""
    packed, _ = quantised_checkpoint(make_checkpoint("qwen3", tmp_path / "plain"), layout)
    _assert_the_same(backend, packed, tmp_path)


@pytest.mark.parametrize("backend", sorted({backend for backend, _ in _CASES}))
@pytest.mark.parametrize("kind", ["rows", "whole"])
def test_eight_bit_floats_that_arrive_during_the_load_compute_the_same(
    backend: Backend, kind: str, tmp_path: Path
) -> None:
    packed, _ = eight_bits(make_checkpoint("llama", tmp_path / "plain"), kind)
    _assert_the_same(backend, packed, tmp_path)


@pytest.mark.parametrize("backend", sorted({backend for backend, _ in _CASES}))
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_weights_that_are_packed_while_they_arrive_compute_the_same(
    backend: Backend, family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    _assert_the_same(backend, checkpoint(family), tmp_path, bits=4)


def _assert_the_same(backend: Backend, source: Path, tmp_path: Path, bits: int | None = None) -> None:
    specs = [replace(spec, bits=bits) for spec in stage_specs(source, (2,))]
    hollow = [_Hollow(source, tmp_path / str(stage)) for stage in range(2)]
    arriving = [replace(s, folder=h.folder, await_tensors=h.bring) for s, h in zip(specs, hollow, strict=True)]
    np.testing.assert_array_equal(_logits(backend, arriving), _logits(backend, specs))
    for spec, folder in zip(specs, hollow, strict=True):
        owned = owned_tensors(open_checkpoint(source), spec.layers, spec.layer_count)
        assert folder.came == {tensor.name for tensor in owned}


@pytest.mark.parametrize("backend", sorted({backend for backend, _ in _CASES}))
def test_reading_before_it_came_computes_something_else(
    backend: Backend, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    [spec] = stage_specs(source, ())
    hasty = replace(spec, folder=_Hollow(source, tmp_path / "hollow").folder, await_tensors=everything_is_here)
    assert not np.array_equal(_logits(backend, [hasty]), _logits(backend, [spec]))


@pytest.mark.parametrize("backend", sorted({backend for backend, _ in _CASES}))
def test_what_keeps_the_weights_from_coming_ends_the_load(backend: Backend, checkpoint: Checkpoints) -> None:
    def never(_names: Iterable[str]) -> None:
        raise NodeLost("the cable is out")

    [spec] = stage_specs(checkpoint("llama"), ())
    engine = create_engine(backend)
    with pytest.raises(NodeLost, match="the cable is out"):
        engine.load(replace(spec, await_tensors=never), lambda _: None)
    engine.close()
