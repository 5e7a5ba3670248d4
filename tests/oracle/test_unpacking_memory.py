"""Unpacking at load on MLX, part by part: the same numbers wherever parts begin, and no more memory than the bytes that
facts predict and a few rows."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.models.families import family_of
from cluster.models.formats import read_quantization
from cluster.models.matrices import read_matrices
from cluster.placement import stage_cost
from cluster.quantities import MIB
from cluster.types import Backend
from node.engines.mlx import by_rows, eight_bits, rows
from node.engines.mlx.engine import MlxEngine
from tests.checkpoints import make_checkpoint
from tests.eight_bit_checkpoints import BLOCK, LAYOUTS
from tests.eight_bit_checkpoints import eight_bits as packed_and_exact
from tests.oracle.pipelines import stage_specs

OTHERS_BYTES = 5 * MIB
"""Scales that are read along, and some rows at once on their way: as codes, in float32 twice, and rounded."""


def with_large_matrices(folder: Path, kind: str) -> Path:
    """One layer, whose MLP has three matrices of sixteen million eight-bit floats."""
    make_checkpoint("llama", folder, layers=1, dtype="bfloat16", hidden_size=512, intermediate_size=32768)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        height, width = BLOCK if kind == "blocks" else (1, columns)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        ending = "_scale_inv" if kind == "blocks" else "_scale"
        tensors[f"{name}{ending}"] = torch.ones(ceil(rows / height), ceil(columns / width))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": LAYOUTS[kind].stated}))
    return folder


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_eight_bits_are_unpacked_a_bounded_part_at_a_time(kind: str, tmp_path: Path) -> None:
    folder = with_large_matrices(tmp_path / "large", kind)
    checkpoint = open_checkpoint(folder)
    (spec,) = stage_specs(folder, ())
    cost = stage_cost(read_facts(checkpoint), spec.layers, Backend.MLX, context=24, users=1, on_cpu=True)
    stored_bytes = max(tensor.size_bytes for tensor in checkpoint.tensors.values())
    engine = MlxEngine()
    before_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    engine.load(spec, lambda progress: None)
    growth_bytes = mx.get_peak_memory() - before_bytes
    engine.close()
    assert stored_bytes >= 16 * MIB
    assert growth_bytes <= cost.weight_bytes + OTHERS_BYTES


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_parts_hold_the_numbers_of_their_rows(
    kind: str, lazily: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seven rows, or fewer: no divisor of a block's 48.
    monkeypatch.setattr(eight_bits, "_PART_BYTES", 4 * 64 * 7)
    monkeypatch.setattr(rows, "_NUMBERS_AT_ONCE", 64 * 7)
    if lazily:
        monkeypatch.setattr(by_rows, "is_packed_at_load", lambda *_: False)
    folder, exact = packed_and_exact(make_checkpoint("llama", tmp_path / "llama"), kind)
    checkpoint = open_checkpoint(folder)
    stated = read_quantization(checkpoint.config, str(folder))
    assert stated is not None
    matrices = read_matrices(checkpoint.tensors.values(), stated, str(folder)).values()
    stored = mx.load(str(folder / "model.safetensors"))
    assert isinstance(stored, dict)
    family, _ = family_of(checkpoint.config, str(folder))
    unpacked, sources = by_rows.split_off(stored, matrices, family, stated=stated, bits=None, dtype=mx.float32)
    assert bool(sources) is not lazily
    reader = rows.RowReader(folder, sources)
    unpacked = reader.placed(unpacked | reader.marks())
    expected = mx.load(str(exact / "model.safetensors"))
    assert isinstance(expected, dict)
    assert unpacked.keys() == expected.keys()
    for name, numbers in expected.items():
        assert mx.array_equal(reader.read(name) if name in reader else unpacked[name], numbers).item(), name
