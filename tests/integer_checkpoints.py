"""Checkpoints as AutoAWQ, AutoGPTQ and llm-compressor save them, beside the same weights dequantised.

What is packed is what those tools pack: the matrices of all layers, but no router, embedding or head. The matrices come
from `tests.integer_formats`, so the dequantised checkpoint is what any exact reader has to compute with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests import integer_formats
from tests.integer_formats import Array, Quantised


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tool quantises, writes and states it."""

    settings: Mapping[str, object]
    write: Callable[[Quantised], dict[str, Array]]
    bits: int = 4
    group: int = 32  # 0: a whole row
    symmetric: bool = False
    reordered: bool = False
    dtype: str = "float16"  # of scales


def _awq(group: int) -> Layout:
    return Layout(
        {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True},
        integer_formats.awq,
        group=group,
    )


def _gptq(version: int, **how: object) -> Layout:
    layout = Layout({}, lambda matrix: integer_formats.gptq(matrix, version=version), **how)  # type: ignore[arg-type]
    settings = {
        "quant_method": "gptq",
        "bits": layout.bits,
        "group_size": layout.group or -1,
        "desc_act": layout.reordered,
        "sym": layout.symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Layout(settings, layout.write, **how)  # type: ignore[arg-type]


def _compressed(**how: object) -> Layout:
    layout = Layout({}, lambda matrix: integer_formats.compressed(matrix, symmetric=bool(how.get("symmetric"))), **how)  # type: ignore[arg-type]
    weights = {
        "num_bits": layout.bits,
        "type": "int",
        "symmetric": layout.symmetric,
        "strategy": "group" if layout.group else "channel",
        "group_size": layout.group or None,
        "actorder": "group" if layout.reordered else None,
    }
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    return Layout(settings, layout.write, **how)  # type: ignore[arg-type]


LAYOUTS = {
    "awq": _awq(32),
    "awq_64": _awq(64),
    "gptq": _gptq(1),
    "gptq_v2": _gptq(2),
    "gptq_symmetric": _gptq(1, symmetric=True),
    "gptq_8bit": _gptq(1, bits=8, symmetric=True),
    "gptq_act_order": _gptq(1, reordered=True),
    "compressed": _compressed(symmetric=True, dtype="float32"),
    "compressed_asymmetric": _compressed(),
    "compressed_16bit": _compressed(symmetric=True),
    "compressed_channel": _compressed(symmetric=True, group=0),
    "compressed_8bit": _compressed(symmetric=True, bits=8),
    "compressed_act_order": _compressed(symmetric=True, reordered=True),
}


def quantised_checkpoint(folder: Path, name: str) -> tuple[Path, Path]:
    """The checkpoint in `folder` packed by the layout called `name`, and the same weights unpacked."""
    layout = LAYOUTS[name]
    targets = folder.with_name(f"{folder.name}_{name}"), folder.with_name(f"{folder.name}_{name}_unpacked")
    files = load_file(folder / "model.safetensors")
    packed, unpacked = dict(files), dict(files)
    for seed, path in enumerate(sorted(files)):
        weight = files[path]
        fits = weight.ndim == 2 and weight.shape[0] % 8 == 0 and weight.shape[1] % 32 == 0
        if not fits or ".layers." not in path or path.endswith("mlp.gate.weight"):
            continue
        quantised = integer_formats.quantise(
            weight.float().numpy(),
            bits=layout.bits,
            group=layout.group or weight.shape[1],
            symmetric=layout.symmetric,
            order=np.random.default_rng(seed).permutation(weight.shape[1]) if layout.reordered else None,
            dtype=layout.dtype,
        )
        unpacked[path] = torch.from_numpy(quantised.dequantised).to(weight.dtype)
        stem = path.removesuffix("weight")
        packed |= {f"{stem}{part}": torch.from_numpy(array.copy()) for part, array in layout.write(quantised).items()}
        del packed[path]
    config = json.loads((folder / "config.json").read_text())
    for target, tensors in zip(targets, (packed, unpacked), strict=True):
        target.mkdir()
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        stated = {"quantization_config": dict(layout.settings)} if tensors is packed else {}
        (target / "config.json").write_text(json.dumps(config | stated))
    return targets
