"""How far back each layer looks, as transformers reads the configuration.

Both engines and the promise of memory go by it. What differs between families is `cluster.models.families`' business.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import ModelError
from cluster.models.family import Family
from cluster.rewinding import window_tokens_max

_EVERYTHING, _WINDOW = "full_attention", "sliding_attention"
_WINDOW_MAX = 1 << 31


def read_windows(family: Family, config: Mapping[str, object], layer_count: int, where: str) -> tuple[int | None, ...]:
    """Positions that each layer attends to, its own among them; None: all."""
    everything: tuple[int | None, ...] = (None,) * layer_count
    if family.windows is None:
        return everything
    window = config.get("sliding_window", family.windows.silent)
    if window is None:
        return everything
    if type(window) is not int or not 1 <= window < _WINDOW_MAX:
        raise ModelError(f"{where}: expected sliding_window from 1 to {_WINDOW_MAX - 1}, found {window!r:.40}")
    kinds = config.get("layer_types")
    if kinds is None:
        period = _period(family, config, where)
        found = [period > 0 and (layer + 1) % period == 0 for layer in range(layer_count)]
    elif isinstance(kinds, list) and len(kinds) == layer_count and not set(kinds) - {_EVERYTHING, _WINDOW}:
        found = [kind == _EVERYTHING for kind in kinds]
    else:
        raise ModelError(
            f"{where}: expected {layer_count} layer_types of {_EVERYTHING} or {_WINDOW}, found {kinds!r:.80}"
        )
    return tuple(None if sees_all else window for sees_all in found)


def kept_positions(
    family: Family, config: Mapping[str, object], layer_count: int, where: str
) -> tuple[int | None, ...]:
    """How many positions of a sequence each layer keeps at most; None: all."""
    windows = read_windows(family, config, layer_count, where)
    return tuple(None if window is None else window_tokens_max(window) for window in windows)


def _period(family: Family, config: Mapping[str, object], where: str) -> int:
    assert family.windows is not None
    setting = family.windows.seeing_all_setting
    period = config.get(setting) if setting else None
    if period is None:
        return family.windows.seeing_all
    if type(period) is not int or period < 1:
        raise ModelError(f"{where}: expected {setting} from 1, found {period!r:.40}")
    return period
