"""What mlx-lm's conversions do to a checkpoint's tensors, undone for the reference of `potluck verify`.

transformers knows nothing of mlx-lm's names and layouts. Written from what mlx-lm's models say that they do to
published files (their `sanitize`), and apart from the engine's reading of the same files (`places`), so that the two
can disagree. Knows no modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from cluster.models.checkpoint import Checkpoint
from cluster.models.layout import canonical_name

Numbers = dict[str, torch.Tensor]

_EXPERTS = re.compile(
    r"(?P<block>.+\.)(?:switch_mlp|experts\.switch_glu|experts)\.(?P<part>gate|up|down)_proj\.(?P<kind>weight|bias)"
)
"""[experts, outputs, inputs], gates and ups apart; transformers has these two in one tensor."""

_INPUTS_FIRST = frozenset({"gpt_oss", "llama4_text"})
"""transformers has their experts as [experts, inputs, outputs]."""

_IN_TURNS = frozenset({"gpt_oss"})
"""A gate, its up, the next gate; elsewhere all gates come first."""

_KEYS, _VALUES = ".embed_q.weight", ".unembed_out.weight"
"""[heads, latent, key] and [heads, value, latent]; published as one matrix, the keys of a head above its values."""

_CONVOLUTIONS = ("conv1d.weight", "conv.conv.weight")
"""[channels, kernel, 1]; published as [channels, 1, kernel]."""

_RAISED = re.compile(
    r"model\.(layers\.\d+\.(.+\.)?(input_layernorm|post_attention_layernorm|q_norm|k_norm)|norm)\.weight"
)
"""Norms of families that multiply by (1 + weight), where mlx-lm stores the sum."""

_RAISED_FAMILIES = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})


def is_converted(checkpoint: Checkpoint) -> bool:
    """Whether mlx-lm has renamed or turned some of its tensors. Most families keep theirs, packed or not."""
    return any(
        _EXPERTS.fullmatch(name) or name.endswith((_KEYS, _VALUES)) or _is_turned(name, tensor.shape)
        for name, tensor in checkpoint.tensors.items()
    )


def unconverted(numbers: Numbers, model_type: str, own_names: Iterable[str]) -> Numbers:
    """The tensors as transformers computes with them, under the `own_names` of its model, which are longer for a text
    model within a vision-language one. `model_type` is the text model's. `numbers` is used up, so that nothing is in
    memory twice."""
    raised = model_type in _RAISED_FAMILIES and any(_is_turned(name, array.shape) for name, array in numbers.items())
    found: Numbers = {}
    while numbers:
        stored, array = numbers.popitem()
        name = canonical_name(stored)
        if match := _EXPERTS.fullmatch(name):
            found |= _experts(match, _with_other_half(stored, array, numbers), model_type)
        elif name.endswith((_KEYS, _VALUES)):
            keys, values = _with_other_half(stored, array, numbers).values()
            attention = name.removesuffix(_KEYS).removesuffix(_VALUES)
            found[f"{attention}.kv_b_proj.weight"] = torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)
        elif _is_turned(name, array.shape):
            found[name] = array.transpose(1, 2).contiguous()
        elif raised and _RAISED.fullmatch(name):
            found[name] = array - 1
        else:
            found[name] = array
    own = {canonical_name(name): name for name in own_names}
    return {own.get(name, name): array for name, array in found.items()}


def _is_turned(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(_CONVOLUTIONS) and len(shape) == 3 and shape[1] != 1


def _with_other_half(name: str, array: torch.Tensor, numbers: Numbers) -> Numbers:
    """The tensor called `name`, with what makes one published tensor with it, in that order; taken out of `numbers`."""
    for first, second in (("gate_proj", "up_proj"), ("embed_q", "unembed_out")):
        if f".{first}." in name:
            return {first: array, second: numbers.pop(name.replace(f".{first}.", f".{second}."))}
        if f".{second}." in name:
            return {first: numbers.pop(name.replace(f".{second}.", f".{first}.")), second: array}
    return {"down_proj": array}


def _experts(match: re.Match[str], parts: Numbers, model_type: str) -> Numbers:
    ending = "_bias" if match["kind"] == "bias" else ""
    if len(parts) == 1:
        (name, whole), *_ = parts.items()
    elif model_type in _IN_TURNS:
        name, whole = "gate_up_proj", torch.stack(tuple(parts.values()), dim=2).flatten(1, 2)
    else:
        name, whole = "gate_up_proj", torch.cat(tuple(parts.values()), dim=1)
    if model_type in _INPUTS_FIRST and not ending:
        whole = whole.transpose(1, 2).contiguous()
    return {f"{match['block']}experts.{name}{ending}": whole}
