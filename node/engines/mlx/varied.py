"""Heads that differ between layers: transformers says so for each layer, mlx-lm for all layers that see everything.

Owns: Gemma 4's two spellings of the same. What a spelling could say and mlx-lm would not compute is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import ModelError

_HEAD_DIM = 512  # of layers that see everything, when nothing is stated


@dataclass(frozen=True, slots=True)
class WideHeads:
    """Of layers that see everything."""

    head_dim: int
    kv_heads: int | None  # None: as many as in other layers

    @property
    def fields(self) -> dict[str, object]:
        return {"global_head_dim": self.head_dim, "num_global_key_value_heads": self.kv_heads}


def read_wide_heads(
    config: Mapping[str, object], windows: Sequence[int | None], head_dim: int, where: str
) -> WideHeads:
    """As the first releases state it for all layers, or as transformers saves it, by layer."""
    stated = config.get("per_layer_config")
    shares_values = config.get("attention_k_eq_v") is True
    if stated is None:
        size, kv_heads = config.get("global_head_dim", _HEAD_DIM), config.get("num_global_key_value_heads")
        kv_heads = kv_heads if shares_values else None
    else:
        wide = _of_layers(stated, [layer for layer, window in enumerate(windows) if window is None], where)
        size, kv_heads = wide.get("head_dim", head_dim), wide.get("num_key_value_heads")
        if kv_heads is not None and not shares_values:
            raise ModelError(
                f"{where}: layers that see everything have {kv_heads!r:.40} key heads and values of their own; the MLX "
                "engine computes another number of key heads only where these are the values too"
            )
    if type(size) is not int or size < 1 or not (kv_heads is None or (type(kv_heads) is int and kv_heads > 0)):
        raise ModelError(
            f"{where}: expected sizes and numbers of heads from 1, found {size!r:.40} and {kv_heads!r:.40}"
        )
    return WideHeads(size, kv_heads)


def _of_layers(stated: object, wide: Sequence[int], where: str) -> Mapping[str, object]:
    """What is stated for each of the layers `wide`, which has to be the same, and nothing for any other."""
    # transformers writes as many digits for each layer as the last one has.
    if isinstance(stated, dict) and sorted(str(layer).lstrip("0") or "0" for layer in stated) == sorted(map(str, wide)):
        found = list(stated.values())
        known = isinstance(found[0], dict) and not found[0].keys() - {"head_dim", "num_key_value_heads"}
        if known and all(layer == found[0] for layer in found):
            return dict(found[0])
    raise ModelError(
        f"{where}: expected per_layer_config with the same head_dim and num_key_value_heads for each of the layers "
        f"{', '.join(map(str, wide))}, which see everything, and for no other; found {stated!r:.120}"
    )
