"""How positions rotate queries and keys: a configuration's settings in the words of mlx-lm.

mlx-lm ignores settings of a rotation that it does not know, and computes with defaults of its own. So whatever it
would ignore is refused here by name, and where its frequencies are not those of transformers, they are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import ModelError
from cluster.models.shape import Shape
from node.engines.mlx.family import MlxFamily, Rotations, States

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
"""What each kind of rotation has to state. `dynamic` is not one: it looks at the longest row of a batch."""

_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "proportional": ("partial_rotary_factor", "factor"),
}

_LOCAL_THETA = 10_000.0  # of Gemma 3's layers with a window, when the configuration is silent
_SECTIONS = frozenset({"mrope_section", "mrope_interleaved"})
_PHI_ORIGINAL = 4096  # tokens of Phi-3's first training, when the configuration is silent


@dataclass(frozen=True, slots=True)
class Rotation:
    """The fields of mlx-lm's argument class, and what these cannot say."""

    fields: Mapping[str, object]
    exact_tokens: int | None = None  # the longest sequence that it rotates as stated; None: any
    periods: tuple[float, ...] | None = None  # of each pair of dimensions where a yarn rotation needs other than theirs


def read_rotation(family: MlxFamily, config: Mapping[str, object], shape: Shape, where: str) -> Rotation:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of version 4."""
    match family.rotations:
        case Rotations.ONE:
            return _one(family, config, shape, where)
        case Rotations.LOCAL_BASE:
            return _local_base(family, config, where)
        case Rotations.SCALED_BEYOND_WINDOWS:
            return _scaled_beyond_windows(family, config, where)
        case Rotations.BY_KIND:
            return _as_stated_by_kind(family, config, where)
        case Rotations.WITH_GROWING_QUERIES:
            return _with_growing_queries(family, config, where)
        case Rotations.PARTIAL:
            return _partial(family, config, shape, where)


def _one(family: MlxFamily, config: Mapping[str, object], shape: Shape, where: str) -> Rotation:
    stated = dict(_stated(config, where))
    theta = _theta(stated.get("rope_theta") or config.get("rope_theta") or family.rope_theta, where)
    truncate = stated.pop("truncate", True)
    scaling = _scaling(stated, family, where)
    periods = None
    if not truncate and scaling and scaling["rope_type"] == "yarn":
        periods = _untruncated_yarn(scaling, theta, shape.head_dim)
    return Rotation({"rope_theta": theta, "rope_scaling": scaling}, periods=periods)


def _local_base(family: MlxFamily, config: Mapping[str, object], where: str) -> Rotation:
    """A rotation for the layers that see everything, another base for those with a window."""
    everywhere, windowed = _by_kind(config, where)
    theta = everywhere.get("rope_theta") or config.get("rope_theta") or family.rope_theta
    local = windowed.get("rope_theta") or config.get("rope_local_base_freq") or _LOCAL_THETA
    _refuse_scaled_windows(windowed, where)
    return Rotation(
        {
            "rope_theta": _theta(theta, where),
            "rope_local_base_freq": _theta(local, where),
            "rope_scaling": _scaling(everywhere, family, where),
        }
    )


def _scaled_beyond_windows(family: MlxFamily, config: Mapping[str, object], where: str) -> Rotation:
    """One base for all layers; what is scaled is scaled only where a layer sees everything."""
    everywhere, windowed = _by_kind(config, where)
    theta = everywhere.get("rope_theta") or config.get("rope_theta") or family.rope_theta
    # Of a configuration in version 4's words, transformers gives the base to the layers that see everything alone.
    local = windowed.get("rope_theta") or (theta if windowed else family.rope_theta)
    _refuse_scaled_windows(windowed, where)
    if local != theta:
        raise ModelError(
            f"{where}: layers with a window rotate with base {local!r:.40}, the others with {theta!r:.40}; "
            "the MLX engine computes only one base for both"
        )
    return Rotation({"rope_theta": _theta(theta, where), "rope_scaling": _scaling(everywhere, family, where)})


def _as_stated_by_kind(family: MlxFamily, config: Mapping[str, object], where: str) -> Rotation:
    """Gemma 4. Both libraries fill in alike what is not stated at all, but not what is stated in part."""
    if config.get("rope_parameters") is None:
        return Rotation({"rope_parameters": None})
    everywhere, windowed = _by_kind(config, where)
    _refuse_scaled_windows(windowed, where)
    scaling = _scaling(everywhere, family, where) or {"rope_type": "default"}
    part = scaling.get("partial_rotary_factor", 1.0)
    # Of heads as large as a power of two, a part that is a whole number of eighths leaves pairs of dimensions.
    if not isinstance(part, int | float) or not 0 < part <= 1 or part * 8 % 1:
        raise ModelError(f"{where}: expected partial_rotary_factor in eighths, up to 1, found {part!r:.40}")
    by_kind = {
        "full_attention": {**scaling, "rope_theta": _theta(everywhere.get("rope_theta"), where)},
        "sliding_attention": {"rope_type": "default", "rope_theta": _theta(windowed.get("rope_theta"), where)},
    }
    return Rotation({"rope_parameters": by_kind})


def _with_growing_queries(family: MlxFamily, config: Mapping[str, object], where: str) -> Rotation:
    """Ministral 3: each time that a position passes another original context, its query grows."""
    stated = dict(_stated(config, where))
    growth = _positive("llama_4_scaling_beta", stated.pop("llama_4_scaling_beta", None), where)
    theta = _theta(stated.get("rope_theta") or config.get("rope_theta") or family.rope_theta, where)
    scaling = _scaling(stated, family, where) or {}
    return Rotation({"rope_parameters": {**scaling, "rope_theta": theta, "llama_4_scaling_beta": growth}})


def _partial(family: MlxFamily, config: Mapping[str, object], shape: Shape, where: str) -> Rotation:
    """Some dimensions of each head; Phi's `longrope` has one factor for each pair of them, short and long.

    mlx-lm always takes the long ones, transformers the short ones as long as the sequence is no longer than the
    model's first training. Given the short ones for long ones, mlx-lm is exact up to there.
    """
    stated = dict(_stated(config, where))
    theta = _theta(stated.get("rope_theta") or config.get("rope_theta") or family.rope_theta, where)
    part = stated.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or family.rotated
    if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part <= 1:
        raise ModelError(f"{where}: expected partial_rotary_factor above 0 and up to 1, found {part!r:.40}")
    kind = stated.get("rope_type") or stated.get("type")
    if kind in ("su", "yarn") and "longrope" in family.rope_types:
        # Phi's first configurations call it so.
        stated["rope_type"] = "longrope"
    if family.states is not States.NONE:
        # Where in time and in a picture a token is: for text, all of them are its position.
        stated = {name: value for name, value in stated.items() if name not in _SECTIONS}
    factor, inner = stated.pop("factor", None), stated.pop("original_max_position_embeddings", None)
    fields: dict[str, object] = {"rope_theta": theta, "partial_rotary_factor": float(part), "rope_scaling": None}
    if family.nests_rotation:
        fields["rope_parameters"] = {"type": "default", "rope_theta": theta, "partial_rotary_factor": float(part)}
    if _scaling(stated, family, where) is None:
        return Rotation(fields)
    # transformers reads the outer setting, and when it is silent takes the default for what is stated inside.
    original, longest = config.get("original_max_position_embeddings", _PHI_ORIGINAL), config["max_position_embeddings"]
    if type(original) is not int or original < 2 or (inner is not None and inner != original):
        raise ModelError(
            f"{where}: expected one original_max_position_embeddings from 2 for the rotation of rope_type {kind}, "
            f"found {original!r:.40} and {inner!r:.40}"
        )
    short = _factors(stated, "short_factor", int(shape.head_dim * part) // 2, where)
    fields["rope_scaling"] = {"type": "longrope", "short_factor": short, "long_factor": short}
    fields["original_max_position_embeddings"] = original
    # Not the shape's context, which ends where the short factors do: this says how far the long ones would reach.
    fields["max_position_embeddings"] = longest if factor is None else original * _positive("factor", factor, where)
    return Rotation(fields, exact_tokens=original)


def _stated(config: Mapping[str, object], where: str) -> Mapping[str, object]:
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new and old and new != old:
        raise ModelError(f"{where}: rope_parameters and rope_scaling contradict each other; remove the wrong one")
    return _mapping(new or old or {}, where)


def _by_kind(config: Mapping[str, object], where: str) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """The settings for layers that see everything, and for those with a window."""
    nested = _mapping(config.get("rope_parameters") or {}, where)
    everywhere = _mapping(nested.get("full_attention") or config.get("rope_scaling") or {}, where)
    return everywhere, _mapping(nested.get("sliding_attention") or {}, where)


def _mapping(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ModelError(f"{where}: expected settings of the rotation (rope), found {value!r:.60}")
    return value


def _theta(value: object, where: str) -> float:
    return _positive("rope_theta", value, where)


def _positive(name: str, value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelError(f"{where}: expected {name} to be a number above 0, found {value!r:.60}")
    return float(value)


def _factors(stated: Mapping[str, object], name: str, count: int, where: str) -> list[float]:
    found = stated[name]
    if not isinstance(found, list) or len(found) != count or not all(type(x) in (int, float) and x > 0 for x in found):
        raise ModelError(f"{where}: expected {count} numbers above 0 as {name} of the rotation, found {found!r:.80}")
    return [float(number) for number in found]


def _refuse_scaled_windows(windowed: Mapping[str, object], where: str) -> None:
    if (kind := windowed.get("rope_type") or "default") != "default":
        raise ModelError(
            f"{where}: rope_type of layers with a window is {kind!r:.40}; here the MLX engine computes default"
        )
    _refuse_unknown("default", windowed, where)


def _scaling(stated: Mapping[str, object], family: MlxFamily, where: str) -> dict[str, object] | None:
    """What mlx-lm calls rope_scaling, with nothing in it that it would ignore."""
    kind = str(stated.get("rope_type") or stated.get("type") or "default")
    if kind not in family.rope_types:
        known = ", ".join(sorted(family.rope_types))
        raise ModelError(f"{where}: rope_type is {kind!r:.40}; here the MLX engine computes {known}")
    _refuse_unknown(kind, stated, where)
    if kind == "default":
        return None
    names = (*_NEEDED[kind], *_OPTIONAL.get(kind, ()))
    numbers = {name: stated[name] for name in names if stated.get(name) is not None}
    if kind != "longrope" and not all(type(number) in (int, float) for number in numbers.values()):
        raise ModelError(f"{where}: expected numbers for the rotation of rope_type {kind}, found {numbers!r:.120}")
    return {"rope_type": kind, **numbers}


def _refuse_unknown(kind: str, stated: Mapping[str, object], where: str) -> None:
    missing = [name for name in _NEEDED[kind] if stated.get(name) is None]
    known = {"rope_theta", "rope_type", "type", *_NEEDED[kind], *_OPTIONAL.get(kind, ())}
    unknown = [name for name, value in stated.items() if name not in known and value is not None]
    if "partial_rotary_factor" in unknown and stated["partial_rotary_factor"] == 1:
        unknown.remove("partial_rotary_factor")
    if "attention_factor" in unknown and kind == "yarn" and stated["attention_factor"] == _yarn_length(stated):
        unknown.remove("attention_factor")
    if kind == "yarn" and bool(stated.get("mscale")) != bool(stated.get("mscale_all_dim")):
        missing.append("one of mscale and mscale_all_dim")
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"also has {', '.join(unknown)}"
        raise ModelError(
            f"{where}: the rotation of rope_type {kind} {problem}; the MLX engine cannot compute it exactly"
        )


def _yarn_length(stated: Mapping[str, object]) -> float | None:
    """By how much a yarn rotation lengthens what it rotates when nothing else is stated: what mlx-lm computes."""
    factor = stated.get("factor")
    if type(factor) not in (int, float) or stated.get("mscale"):
        return None
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0  # type: ignore[operator, arg-type]


def _untruncated_yarn(scaling: Mapping[str, object], theta: float, dims: int) -> tuple[float, ...]:
    """Periods of a yarn rotation (arXiv 2309.00071) whose ramp does not begin and end at whole dimensions."""
    number = {name: float(value) for name, value in scaling.items() if isinstance(value, int | float)}
    original, factor = number["original_max_position_embeddings"], number["factor"]

    def dimension(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(dimension(number.get("beta_fast", 32.0)), 0.0)
    high = min(dimension(number.get("beta_slow", 1.0)), dims - 1.0)
    high += 0.001 if low == high else 0.0
    periods = []
    for pair in range(dims // 2):
        slowed = min(max((pair - low) / (high - low), 0.0), 1.0)
        period = theta ** (2 * pair / dims)
        periods.append(1 / (slowed / (factor * period) + (1 - slowed) / period))
    return tuple(periods)
