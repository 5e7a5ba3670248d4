"""`potluck verify` on AWQ, GPTQ and compressed-tensors checkpoints: the reference unpacks them by their definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.cli.verify import whole_bytes
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.types import Backend
from node.engines.torch import repack
from node.engines.torch.dequantised import dequantised
from tests.checkpoints import make_checkpoint
from tests.integer_checkpoints import LAYOUTS, quantised_checkpoint
from tests.oracle.reference import Reference
from tests.oracle.test_verify import MIXED, TORCH, trace_of, verdict_of

Integers = Callable[[str, str], tuple[Path, Reference]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_unpacks_every_layout(layout: str, tmp_path: Path) -> None:
    packed, unpacked = quantised_checkpoint(make_checkpoint("llama", tmp_path / "llama", layers=1), layout)
    checkpoint = open_checkpoint(packed)
    stated = read_facts(checkpoint).quantization
    found, expected = dequantised(checkpoint, stated, torch.float32), load_file(unpacked / "model.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("layout", ["awq", "gptq_act_order", "compressed"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_stages_of_both_engines_are_within_tolerance(family: str, layout: str, integers: Integers) -> None:
    packed, _ = integers(family, layout)
    trace = trace_of(packed)
    assert np.isfinite(trace.logits).all()
    assert verdict_of(packed, MIXED, trace).within


def test_the_reference_needs_room_to_unpack(tmp_path: Path) -> None:
    """Numbers, and the model that is made of them."""
    folder = make_checkpoint("llama", tmp_path / "llama", layers=2)
    packed, unpacked = (open_checkpoint(made) for made in quantised_checkpoint(folder, "awq"))
    needed = 2 * read_facts(unpacked).stored_bytes
    assert whole_bytes(packed, read_facts(packed), Backend.TORCH) == needed > 3 * read_facts(packed).stored_bytes


def test_codes_in_a_wrong_order_are_found(integers: Integers, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = integers("llama", "awq")
    trace = trace_of(packed)
    monkeypatch.setattr(repack, "AWQ_ORDER", tuple(range(8)))
    assert not verdict_of(packed, TORCH, trace).within
