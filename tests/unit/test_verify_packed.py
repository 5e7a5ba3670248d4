"""`potluck verify` of a model that is packed at load: what it is compared with, and known by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.cli.verify import packed_id
from cluster.cli.verify_cut import read_plan
from cluster.models.formats import Packing, Quantization
from cluster.types import Backend, LayerRange, ModelId
from node.comparison import Trace
from node.hardware import Device
from node.verdict import Part
from node.verification import Subject, _Run
from tests.clusters import model

FACTS = model([50] * 3)
PACKED = replace(FACTS, quantization=Quantization(Packing.AFFINE, 4, 64), bits=4)


def test_it_has_fingerprints_of_its_own() -> None:
    assert packed_id(ModelId("m"), FACTS) == "m"
    assert len({packed_id(ModelId("m"), replace(FACTS, bits=bits)) for bits in (None, 4, 6, 8)}) == 4


@pytest.mark.parametrize(
    ("facts", "backend", "alike"),
    [(FACTS, Backend.TORCH, True), (PACKED, Backend.TORCH, False), (PACKED, Backend.MLX, True)],
)
def test_what_torch_keeps_packed_transformers_does_not_compute_alike(
    facts: object, backend: Backend, alike: bool
) -> None:
    part = Part(0, LayerRange(0, 3), Device(backend, "cpu", "a processor"))
    trace = Trace(part.device, (0,), (), np.zeros((1, 1), np.float32))
    run = _Run(Subject(Path("nowhere"), facts, (part,)), trace, None, None)  # type: ignore[arg-type]
    assert run.computes_alike(part) is alike


@pytest.mark.parametrize("bits", [None, 6])
def test_the_running_plan_says_what_its_weights_are_packed_in(bits: int | None) -> None:
    stage = {"node": "a", "backend": "mlx", "first_layer": 0, "last_layer": 3}
    status = {
        "model": {"source": "org/m", "revision": None, "bits": bits},
        "nodes": [{"name": "a", "device": "cpu"}],
        "plan": {"stages": [stage]},
    }
    assert read_plan(status).bits == bits
