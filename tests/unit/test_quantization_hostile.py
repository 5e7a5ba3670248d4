"""Quantisation settings and tensors that nobody vouches for: a model that can be placed, or a ModelError, and never
memory in proportion to what they claim."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint, StoredTensor
from cluster.models.facts import ModelFacts, read_facts
from cluster.placement.costs import NEVER, CostTable, stage_cost
from cluster.quantities import MIB
from cluster.types import DType, LayerRange
from tests.allocations import allocating_at_most
from tests.paper_models import Tensors, paper_config

HIDDEN, INNER, VOCABULARY, HEADS, HEAD_DIM, LAYERS, GROUP = 64, 128, 40, 4, 16, 2, 32
I32, F16, U8, U32 = DType.I32, DType.F16, DType.U8, DType.U32

ALLOCATED_MAX_BYTES = 2 * MIB
"""A model of two layers takes some 100 KiB of Python's objects, and numpy's tables hardly more."""

WEIGHTS = {"num_bits": 4, "group_size": GROUP, "strategy": "group", "symmetric": True, "type": "int"}

SETTINGS: dict[str, dict[str, Any]] = {
    "affine": {"bits": 4, "group_size": GROUP, "model.layers.0.mlp.up_proj": {"bits": 4, "group_size": GROUP}},
    "mxfp4": {"bits": 4, "group_size": GROUP, "mode": "mxfp4"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": True},
    "compressed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": WEIGHTS, "targets": ["Linear"]}},
    },
}

PACKED: Mapping[str, Callable[[int, int], Tensors]] = {
    "affine": lambda rows, columns: {
        ".weight": (U32, (rows, columns // 8)),
        ".scales": (F16, (rows, columns // GROUP)),
        ".biases": (F16, (rows, columns // GROUP)),
    },
    "mxfp4": lambda rows, columns: {
        ".weight": (U32, (rows, columns // 8)),
        ".scales": (U8, (rows, columns // GROUP)),
    },
    "fp8": lambda rows, columns: {
        ".weight": (DType.F8_E4M3, (rows, columns)),
        ".weight_scale_inv": (DType.F32, (rows // GROUP, columns // GROUP)),
    },
    "awq": lambda rows, columns: {
        ".qweight": (I32, (columns, rows // 8)),
        ".qzeros": (I32, (columns // GROUP, rows // 8)),
        ".scales": (F16, (columns // GROUP, rows)),
    },
    "gptq": lambda rows, columns: {
        ".qweight": (I32, (columns // 8, rows)),
        ".qzeros": (I32, (columns // GROUP, rows // 8)),
        ".scales": (F16, (columns // GROUP, rows)),
        ".g_idx": (I32, (columns,)),
    },
    "compressed": lambda rows, columns: {
        ".weight_packed": (I32, (rows, columns // 8)),
        ".weight_scale": (F16, (rows, columns // GROUP)),
        ".weight_shape": (DType.I64, (2,)),
    },
}

MATRICES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}

CONFIG = paper_config("llama", LAYERS) | {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_DIM,
}


def tensors_of(kind: str) -> Tensors:
    tensors: Tensors = {
        "model.embed_tokens.weight": (F16, (VOCABULARY, HIDDEN)),
        "lm_head.weight": (F16, (VOCABULARY, HIDDEN)),
        "model.norm.weight": (F16, (HIDDEN,)),
    }
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = (F16, (HIDDEN,))
        for name, (rows, columns) in MATRICES.items():
            for ending, stored in PACKED[kind](rows, columns).items():
                tensors[f"model.layers.{layer}.{name}{ending}"] = stored
    return tensors


def facts_of(stated: object, tensors: Tensors, bits: int | None = None) -> ModelFacts:
    """As a folder with these headers; files of any size are sparse, so their tensors may claim anything."""
    stored, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.size_bytes
        stored[name] = StoredTensor(name, dtype, shape, "model.safetensors", begin, end)
    return read_facts(Checkpoint(Path("x"), CONFIG | {"quantization_config": stated}, stored), bits)


def check_costs(facts: ModelFacts) -> None:
    """Every cost that a plan asks for is a number of bytes that sums can hold."""
    assert facts.stored_bytes >= 0
    for backend in facts.backends:
        table = CostTable(facts, context=4096, users=4)
        for costs in (table.memory(backend, True), table.streamed):
            assert costs.min() >= 0
        cost = stage_cost(facts, LayerRange(0, facts.layer_count), backend, context=4096, users=4, on_cpu=True)
        assert 0 < cost.weight_bytes <= cost.memory_bytes < NEVER


@pytest.mark.parametrize("kind", SETTINGS)
def test_as_published_it_can_be_placed(kind: str) -> None:
    """Else the tests below might refuse everything for one and the same reason."""
    facts = facts_of(SETTINGS[kind], tensors_of(kind))
    assert facts.backends
    check_costs(facts)


ODD = (0, 1, 2, 3, 4, 7, 8, 32, 255, 1 << 20, 1 << 31, 1 << 62, 10**30, -1, True, False, None, 0.5, 1e308,
       float("nan"), float("inf"), "", "gemm", "mxfp4", "block", "channel", "group", "x" * 100)  # fmt: skip
odd_values = st.recursive(
    st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bits", "group_size"]), inner),
    max_leaves=4,
)
KEYS = (
    "bits", "group_size", "mode", "quant_method", "format", "config_groups", "weight_block_size", "version", "sym",
    "desc_act", "zero_point", "checkpoint_format", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj",
    "num_bits", "strategy", "symmetric", "type", "actorder", "block_structure", "weights", "group_0",
)  # fmt: skip
EXTENTS = st.sampled_from([0, 1, 2, 8, 16, 32, 64, 127, 128, 1 << 20, 1 << 40, 1 << 62])


def changed(stated: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """With another value wherever the key stands, else at the top."""
    made = copy.deepcopy(stated)
    waiting, found = [made], False
    while waiting:
        place = waiting.pop()
        waiting += [inner for inner in place.values() if isinstance(inner, dict)]
        if key in place:
            place[key], found = value, True
    return made if found else made | {key: value}


@settings(max_examples=150)
@given(st.data())
def test_odd_settings_are_refused_or_placed(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(SETTINGS)))
    stated, tensors = SETTINGS[kind], tensors_of(data.draw(st.sampled_from([kind] * 5 + sorted(SETTINGS))))
    for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        stated = changed(stated, key, data.draw(odd_values))
    _refused_or_placed(stated, tensors, data.draw(st.sampled_from([None, None, 4, 8])))


@settings(max_examples=150)
@given(st.data())
def test_odd_shapes_are_refused_or_placed(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(SETTINGS)))
    tensors = tensors_of(kind)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        dtype = data.draw(st.sampled_from([tensors[name][0], *DType]))
        tensors[name] = (dtype, tuple(data.draw(st.lists(EXTENTS, max_size=4))))
    _refused_or_placed(SETTINGS[kind], tensors, None)


@settings(max_examples=100)
@given(kind=st.sampled_from(sorted(SETTINGS)), places=st.lists(st.integers(0, 1), max_size=1), factor=EXTENTS)
def test_matrices_that_are_too_large_in_the_same_way_are_refused_or_placed(
    kind: str, places: list[int], factor: int
) -> None:
    """Shapes that fit each other get further than odd ones."""
    tensors = {
        name: (dtype, tuple(extent * factor if place in places else extent for place, extent in enumerate(shape)))
        for name, (dtype, shape) in tensors_of(kind).items()
    }
    _refused_or_placed(SETTINGS[kind], tensors, None)


def _refused_or_placed(stated: object, tensors: Tensors, bits: int | None) -> None:
    with allocating_at_most(ALLOCATED_MAX_BYTES):
        try:
            facts = facts_of(stated, tensors, bits)
        except ModelError as error:
            str(error).encode()
            return
        check_costs(facts)
