"""How far back each layer looks, as transformers reads the configuration.

Both engines and the promise of memory go by it. What differs between families is `cluster.models.families`' business.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import ModelError
from cluster.models.family import Family
from cluster.rewinding import window_tokens_max

_EVERYTHING = "full_attention"
_WINDOW_MAX = 1 << 31


def read_windows(family: Family, config: Mapping[str, object], layer_count: int, where: str) -> tuple[int | None, ...]:
    """Positions that each layer attends to, its own among them; None: all."""
    everything: tuple[int | None, ...] = (None,) * layer_count
    if family.windows is None:
        return everything
    setting, kind = family.windows.setting, family.windows.kind
    window = config.get(setting, family.windows.silent)
    if window is None and not family.windows.in_chunks:
        return everything
    if type(window) is not int or not 1 <= window < _WINDOW_MAX:
        raise ModelError(f"{where}: expected {setting} from 1 to {_WINDOW_MAX - 1}, found {window!r:.40}")
    kinds = config.get("layer_types")
    listed = config.get(family.windows.listed or "")
    if kinds is None and listed:
        if not isinstance(listed, list) or len(listed) != layer_count or not all(flag in (0, 1) for flag in listed):
            raise ModelError(f"{where}: expected {layer_count} {family.windows.listed} of 0 or 1, found {listed!r:.80}")
        found = [flag == 0 for flag in listed]
    elif kinds is None:
        period = _period(family, config, where)
        found = [period > 0 and (layer + 1) % period == 0 for layer in range(layer_count)]
    elif isinstance(kinds, list) and len(kinds) == layer_count and not set(kinds) - {_EVERYTHING, kind}:
        found = [each == _EVERYTHING for each in kinds]
    else:
        raise ModelError(f"{where}: expected {layer_count} layer_types of {_EVERYTHING} or {kind}, found {kinds!r:.80}")
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
