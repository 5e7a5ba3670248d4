"""Layers that attend to the keys and values of an earlier layer instead of their own.

The library hands them that layer's new keys and values; what they attend to is all of its cache. Knows the attribute
names by which `transformers` modules of this kind are told.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cluster.errors import ModelError

Cached = tuple[torch.Tensor, torch.Tensor, int]
"""Keys and values of one sequence in one layer, [kv heads, positions, size] each, and the first of the positions."""


def shares(module: torch.nn.Module) -> bool:
    """Whether the attention module has no keys of its own."""
    return bool(getattr(module, "is_kv_shared_layer", False))


def offers(module: torch.nn.Module) -> bool:
    """Whether later layers attend to the attention module's keys."""
    return bool(getattr(module, "store_full_length_kv", False))


def offer(module: torch.nn.Module, cached: Cached, offered: dict[str, Cached]) -> None:
    """Let later layers of the module's kind have what it attends to."""
    offered[str(module.layer_type)] = cached


def borrow(module: torch.nn.Module, offered: dict[str, Cached]) -> Cached:
    """What the last layer of the module's kind with keys of its own attends to."""
    return offered[str(module.layer_type)]


def refuse_parted(modules: Iterable[torch.nn.Module]) -> None:
    """Raise ModelError when one of a slice's modules attends to the keys of a layer that is not in the slice."""
    offering = set()
    for module in modules:
        if offers(module):
            offering.add(module.layer_type)
        if shares(module) and module.layer_type not in offering:
            raise ModelError(
                f"layers of kind {module.layer_type} at the end attend to the keys of an earlier layer, "
                "which is on another stage; a plan must not part them"
            )
