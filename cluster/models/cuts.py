"""Where a model may be cut: layers that attend to the keys and values of an earlier one stay with it.

Owns: which layers share, as transformers and mlx-lm both read a configuration. Knows no sizes and no engines.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import ModelError


def keys_of(config: Mapping[str, object], layer_count: int, sharing: int, where: str) -> tuple[int, ...]:
    """For each layer the one whose keys and values it attends to: its own, or for the last `sharing` layers those of
    the last layer of the same kind before them all."""
    first = layer_count - sharing
    if sharing == 0:
        return tuple(range(layer_count))
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layer_count or not all(isinstance(kind, str) for kind in kinds):
        raise ModelError(f"{where}: expected {layer_count} layer_types, because layers share keys; found {kinds!r:.60}")
    before = set(kinds[: max(0, first)])
    if orphans := sorted(set(kinds[max(0, first) :]) - before):
        raise ModelError(
            f"{where}: the last {sharing} of {layer_count} layers attend to the keys of earlier layers of their kind, "
            f"and there is none of {', '.join(orphans)}"
        )
    sources = {kind: layer for layer, kind in enumerate(kinds[:first])}
    return (*range(first), *(sources[kind] for kind in kinds[first:]))


def legal_cuts(sources: tuple[int, ...]) -> frozenset[int]:
    """Layers at which a stage may begin: no layer from there on attends to the keys of one before."""
    oldest = len(sources)
    cuts = set()
    for layer in reversed(range(len(sources))):
        oldest = min(oldest, sources[layer])
        if oldest >= layer:
            cuts.add(layer)
    return frozenset(cuts)
