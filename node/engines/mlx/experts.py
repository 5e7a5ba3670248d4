"""Experts' matrices under the names and in the order that `mlx-lm` computes with.

transformers stacks a layer's experts in two tensors, or writes every expert on its own; mlx-lm wants three stacks.
Everything here is lazy: a stack is there twice only while it is made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from cluster.errors import ModelError

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_ALONE = re.compile(r"(?P<index>0|[1-9][0-9]{0,5})\.(?P<part>gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True, slots=True)
class Stacks:
    """How a family's experts are called within a layer, by transformers and by mlx-lm."""

    stored: str
    taken: str
    inputs_first: bool = False  # stacks are [experts, inputs, outputs] in files; always [experts, outputs, inputs] here


def in_stacks(lazy: Mapping[str, mx.array], stacks: Stacks) -> dict[str, mx.array]:
    """The tensors with every layer's experts as mlx-lm takes them; whatever is none keeps its name."""
    taken: dict[str, mx.array] = {}
    alone: dict[str, dict[int, mx.array]] = {}
    for name, array in lazy.items():
        layer, found, rest = name.partition(f".{stacks.stored}")
        match = _ALONE.fullmatch(rest)
        if found and rest in _PARTS and array.ndim == 3:
            turned = array.swapaxes(-1, -2) if stacks.inputs_first else array
            pieces = mx.split(turned, len(_PARTS[rest]), axis=-2)
            taken |= {
                f"{layer}.{stacks.taken}{part}.weight": piece for part, piece in zip(_PARTS[rest], pieces, strict=True)
            }
        elif found and match:
            stack = f"{layer}.{stacks.taken}{match['part']}.weight"
            alone.setdefault(stack, {})[int(match["index"])] = array
        else:
            taken[name] = array
    for stack, experts in alone.items():
        if sorted(experts) != list(range(len(experts))) or len({array.shape for array in experts.values()}) != 1:
            raise ModelError(f"{stack}: some of its experts are missing or differ in shape; download the model again")
        taken[stack] = mx.stack([experts[index] for index in range(len(experts))])
    return taken
