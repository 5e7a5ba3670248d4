"""Checkpoints whose numbers are what packing at load leaves of others', for references that know nothing of packing.

Written apart from the product: which tensors are packed is a list of names here, and MLX itself does the rounding.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

_PACKED = re.compile(
    r"model\.(embed_tokens|embed_tokens_per_layer|per_layer_model_projection)\.weight|lm_head\.weight"
    r"|.+\.self_attn\.(q|k|v|o|out|q_a|q_b|kv_a|kv_a_with_mqa|qkv)_proj(_with_mqa)?\.weight"
    r"|.+\.(mlp|feed_forward)\.(shared_experts?\.|experts\.\d+\.)?(gate|up|down|gate_up|w1|w2|w3)(_proj)?\.weight"
    r"|.+\.experts\.(gate_up|down)_proj"
    r"|.+\.layers\.\d+\.per_layer_(input_gate|projection)\.weight"
    r"|.+\.(linear_attn|conv)\.(in|out)_proj(_\w+)?\.weight"
)
_ROUTER = re.compile(r".+\.mlp\.gate\.weight")


def dequantised(folder: Path, target: Path, bits: int) -> Path:
    """The checkpoint with every packed matrix rounded to `bits`, in groups of 64 inputs; in float32, which holds codes
    times scales plus biases as they are."""
    shutil.copytree(folder, target)
    stated = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stated | {"dtype": "float32"}))
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    for name, array in tensors.items():
        turned = stated["model_type"] in ("gpt_oss", "llama4_text") and ".experts." in name and array.ndim == 3
        matrix = array.swapaxes(1, 2) if turned else array
        if _PACKED.fullmatch(name) and not _ROUTER.fullmatch(name) and matrix.shape[-1] % 64 == 0:
            matrix = _rounded(matrix, bits)
        tensors[name] = mx.contiguous(matrix.swapaxes(1, 2) if turned else matrix).astype(mx.float32)
    mx.save_safetensors(str(target / "model.safetensors"), tensors, {"format": "pt"})
    return target


def _rounded(matrix: mx.array, bits: int) -> mx.array:
    codes, scales, biases = mx.quantize(matrix, group_size=64, bits=bits, stream=mx.cpu)
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(codes, *wide, group_size=64, bits=bits, stream=mx.cpu)
