"""Checkpoints with matrices as eight-bit floats, written by the formats' definitions, and the same numbers in full."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = (48, 32)  # rows and columns; neither divides all matrices of these checkpoints
_LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Layout:
    """How a publisher writes them."""

    stated: Mapping[str, object]  # as quantization_config
    block: tuple[int | None, int | None]  # rows and columns that share a scale; None: all
    scale: str = ".weight_scale"
    inputs: str | None = None  # what their kernels round activations by
    scalar: bool = False  # a scale without a dimension


def _compressed(**weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


LAYOUTS = {
    "blocks": Layout(
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}, BLOCK, ".weight_scale_inv"
    ),
    "rows": Layout(_compressed(strategy="channel"), (1, None), inputs=".activation_scale"),
    "whole": Layout(_compressed(strategy="tensor"), (None, None), inputs=".input_scale"),
    "one": Layout(
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        (None, None), ".weight_scale_inv", ".activation_scale", scalar=True,
    ),
    "compressed blocks": Layout(_compressed(strategy="block", block_structure=list(BLOCK)), BLOCK),
}  # fmt: skip


def eight_bits(folder: Path, kind: str) -> tuple[Path, Path]:
    """A checkpoint with the linear layers' matrices as eight-bit floats, and the same numbers in full precision."""
    layout = LAYOUTS[kind]
    packed, unpacked = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_linear = name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))
        if not is_linear:
            packed[name] = unpacked[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        packed[name], scales, unpacked[name] = _scaled(tensor, layout)
        packed[stem + layout.scale] = scales
        if layout.inputs is not None:
            packed[stem + layout.inputs] = torch.ones(1)
    targets = folder.with_name("packed"), folder.with_name("unpacked")
    for target, tensors in zip(targets, (packed, unpacked), strict=True):
        target.mkdir()
        config = json.loads((folder / "config.json").read_text())
        if tensors is packed:
            config["quantization_config"] = layout.stated
        (target / "config.json").write_text(json.dumps(config))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return targets


def _scaled(matrix: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of eight bits, their scales, and what they stand for, block by block."""
    height, width = (given or whole for given, whole in zip(layout.block, matrix.shape, strict=True))
    codes, exact = torch.empty_like(matrix, dtype=torch.float8_e4m3fn), torch.empty_like(matrix)
    scales = torch.empty(-(-matrix.shape[0] // height), -(-matrix.shape[1] // width))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = matrix[block].abs().max() / _LARGEST
            codes[block] = (matrix[block] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[block] = codes[block].float() * scales[i, j]
    if layout.block == (None, None):
        scales = scales.view(()) if layout.scalar else scales.view(1)
    return codes, scales, exact
