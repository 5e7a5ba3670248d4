"""A checkpoint's configuration in the words of mlx-lm's argument classes.

mlx-lm ignores what it does not know and assumes defaults of its own where a configuration is silent; a wrong
rotation base or a forgotten setting gives a model that answers and is subtly wrong. So everything that changes
the result is translated, and whatever mlx-lm would ignore is refused by name. What differs between families is
`families`, and how positions rotate is `rotations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from cluster.models.families import family_of
from cluster.models.layout import head_is_tied
from cluster.models.shape import Shape, read_shape
from cluster.models.windows import read_windows
from node.engines.mlx.chunked import refuse_irregular
from node.engines.mlx.families import MLX_FAMILIES
from node.engines.mlx.family import MlxFamily, States, Windows
from node.engines.mlx.rotations import Rotation, read_rotation
from node.engines.mlx.varied import read_wide_heads

_EVERYTHING, _WINDOW = "full_attention", "sliding_attention"
_STATES = ("conv", "linear_attention")


@dataclass(frozen=True, slots=True)
class Arguments:
    """What builds the model: the module in mlx_lm.models, the fields of its argument class, and what these lack."""

    family: MlxFamily
    fields: Mapping[str, object]
    rotation: Rotation
    shape: Shape
    tied: bool  # the head computes with the embedding's weights
    windows: tuple[int | None, ...]  # how many positions each layer looks back; None: all
    states: tuple[bool, ...]  # layers that keep a state of fixed size in place of keys and values

    @property
    def module(self) -> str:
        return self.family.module


def read_arguments(checkpoint: Checkpoint) -> Arguments:
    """The arguments of the checkpoint's text model; ModelError names what mlx-lm would not compute as stated."""
    where = str(checkpoint.folder)
    named, config = family_of(checkpoint.config, where)
    family = MLX_FAMILIES.get(named.model_type)
    if family is None:
        known = ", ".join(MLX_FAMILIES)
        raise ModelError(f"{where}: the MLX engine does not run {named.model_type}; it runs {known}")
    _refuse_settings(family, config, where)
    shape, tied = read_shape(named, config, where), head_is_tied(checkpoint)
    rotation = read_rotation(family, config, shape, where)
    if family.windows is Windows.CHUNKED:
        refuse_irregular(config, shape.layer_count, where)
    windows = read_windows(named, config, shape.layer_count, where)
    states = _states(family, config, shape, where)
    fields: dict[str, object] = {
        "model_type": named.model_type,
        "num_hidden_layers": shape.layer_count,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.dense_width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context_tokens,
        "rms_norm_eps": _or_default(config, "rms_norm_eps", family.norm_eps),
        "tie_word_embeddings": tied,
        **rotation.fields,
        **_window_fields(family, windows, where),
        **_state_fields(family, states, where),
        **{name: _setting(family, config, name, silent) for name, silent in family.copied.items()},
    }
    if family.wide_heads:
        fields |= read_wide_heads(config, windows, shape.head_dim, where).fields
    if shape.experts:
        fields[family.experts_field] = shape.experts
    fields |= {name: _repeated(config, name, fields[other], where) for name, other in family.same.items()}
    _refuse_lost(family, fields, shape, tied, where)
    lacking = family.lacks if family.tied is None else family.lacks | {"tie_word_embeddings"}
    kept = {name: value for name, value in fields.items() if name not in lacking}
    return Arguments(family, kept, rotation, shape, tied, windows, states)


def _or_default(config: Mapping[str, object], name: str, silent: object) -> object:
    value = config.get(name)
    return silent if value is None else value


def _setting(family: MlxFamily, config: Mapping[str, object], name: str, silent: object) -> object:
    return config.get(name, silent) if name in family.nullable else _or_default(config, name, silent)


def _repeated(config: Mapping[str, object], name: str, value: object, where: str) -> object:
    if (found := _or_default(config, name, value)) != value:
        raise ModelError(f"{where}: {name} is {found!r:.40} where another setting of the same says {value!r:.40}")
    return value


def _refuse_settings(family: MlxFamily, config: Mapping[str, object], where: str) -> None:
    for name, expected in family.expected.items():
        found = _or_default(config, name, None if isinstance(expected, frozenset) else expected)
        if found != expected and not (isinstance(expected, frozenset) and found in expected):
            raise ModelError(f"{where}: {name} is {found!r:.60}; the MLX engine computes only {expected!r}")
    if config.get("model_file"):
        raise ModelError(f"{where}: config.json names code of its own (model_file), which Potluck never runs")


def _refuse_lost(family: MlxFamily, fields: Mapping[str, object], shape: Shape, tied: bool, where: str) -> None:
    """A field that mlx-lm's class lacks has to be what mlx-lm takes for granted."""
    if family.tied is not None and tied != family.tied:
        kind = "tied to the embedding" if family.tied else "of its own"
        raise ModelError(f"{where}: tie_word_embeddings is {tied}; here the MLX engine computes only a head {kind}")
    by_division = shape.hidden_size // shape.heads
    # With compressed queries and keys (`qk_nope_head_dim`), heads have sizes of their own.
    if "head_dim" in family.lacks and "qk_nope_head_dim" not in fields and shape.head_dim != by_division:
        raise ModelError(f"{where}: head_dim is {shape.head_dim}; here the MLX engine computes only {by_division}")
    if "rope_scaling" in family.lacks and fields["rope_scaling"] is not None:
        raise ModelError(f"{where}: expected a rotation without scaling, found {fields['rope_scaling']!r:.60}")


def _window_fields(family: MlxFamily, windows: tuple[int | None, ...], where: str) -> dict[str, object]:
    """What tells mlx-lm the same, where it can be told."""
    size = next((window for window in windows if window is not None), 1)  # no layer has it then
    everything = tuple(window is None for window in windows)
    match family.windows:
        case Windows.NONE | Windows.IGNORED:
            return {}
        case Windows.CHUNKED:
            return {"attention_chunk_size": size}
        case Windows.LISTED:
            kinds = [_EVERYTHING if sees else _WINDOW for sees in everything]
            if len(set(kinds)) < 2:
                raise ModelError(f"{where}: every layer is of kind {kinds[0]}; here the MLX engine needs both kinds")
            return {"sliding_window": size, "layer_types": kinds}
        case Windows.PERIOD:
            return {"sliding_window": size, "sliding_window_pattern": _regular(everything, where)}


def _states(family: MlxFamily, config: Mapping[str, object], shape: Shape, where: str) -> tuple[bool, ...]:
    """Which layers keep a state, as transformers reads the configuration."""
    if family.states is States.NONE:
        return (False,) * shape.layer_count
    kinds = config.get("layer_types")
    if kinds is None and family.states is States.PERIOD:
        period = _or_default(config, "full_attention_interval", family.attending)
        if type(period) is not int or period < 1:
            raise ModelError(f"{where}: expected full_attention_interval from 1, found {period!r:.40}")
        return tuple((layer + 1) % period != 0 for layer in range(shape.layer_count))
    if kinds is None and isinstance(attending := config.get("full_attn_idxs"), list):
        return tuple(layer not in attending for layer in range(shape.layer_count))
    if not isinstance(kinds, list) or len(kinds) != shape.layer_count or set(kinds) - {_EVERYTHING, *_STATES}:
        known = f"{_EVERYTHING}, {' or '.join(_STATES)}"
        raise ModelError(f"{where}: expected {shape.layer_count} layer_types of {known}, found {kinds!r:.80}")
    return tuple(kind in _STATES for kind in kinds)


def _state_fields(family: MlxFamily, states: tuple[bool, ...], where: str) -> dict[str, object]:
    match family.states:
        case States.NONE:
            return {}
        case States.LISTED:
            if all(states):
                raise ModelError(f"{where}: no layer attends; here the MLX engine needs one that does")
            return {"layer_types": ["conv" if state else _EVERYTHING for state in states]}
        case States.PERIOD:
            return {"full_attention_interval": _regular(tuple(not state for state in states), where)}


def _regular(chosen: tuple[bool, ...], where: str) -> int:
    """The period at which the chosen layers recur; one beyond the last layer when there are none."""
    period = chosen.index(True) + 1 if True in chosen else len(chosen) + 1
    if any(choice != ((layer + 1) % period == 0) for layer, choice in enumerate(chosen)):
        raise ModelError(f"{where}: layer_types do not repeat regularly, which the MLX engine does not compute")
    return period
