"""What a row of mlx-lm's family table says: the words in which families differ inside of mlx-lm.

Knows no family; the rows are `families`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from node.engines.mlx.experts import Stacks


class Rotations(enum.Enum):
    """Where a configuration states how positions rotate queries and keys, and in whose words mlx-lm wants it."""

    ONE = enum.auto()  # the same for all layers
    LOCAL_BASE = enum.auto()  # layers with a window have a base of their own
    SCALED_BEYOND_WINDOWS = enum.auto()  # one base; only layers without a window are scaled
    BY_KIND = enum.auto()  # each kind of layer has its own, and mlx-lm takes both as they are stated
    WITH_GROWING_QUERIES = enum.auto()  # the same for all layers, beside how much longer queries become
    PARTIAL = enum.auto()  # some dimensions of a head only, and factors for each of them


class Windows(enum.Enum):
    """How mlx-lm knows which layers look back only `sliding_window` positions."""

    NONE = enum.auto()  # no layer does
    PERIOD = enum.auto()  # from the period at which layers recur that see everything
    LISTED = enum.auto()  # from `layer_types`
    CHUNKED = enum.auto()  # from the number of the layer; its masks are for one row, so the engine makes them
    IGNORED = enum.auto()  # it does not; the engine's own masks make it so


class States(enum.Enum):
    """How mlx-lm knows which layers keep a state of fixed size in place of keys and values."""

    NONE = enum.auto()  # no layer does
    PERIOD = enum.auto()  # from the period at which layers recur that attend
    LISTED = enum.auto()  # from `layer_types`


@dataclass(frozen=True, slots=True)
class MlxFamily:
    """How mlx-lm computes the models of one `model_type`."""

    module: str  # in mlx_lm.models
    rope_types: frozenset[str]
    rope_theta: float  # of a configuration that states none
    expected: Mapping[str, object]  # settings that mlx-lm takes for granted (or any of a set of values)
    copied: Mapping[str, object] = field(default_factory=dict)  # settings passed on, with what silence means
    nullable: frozenset[str] = frozenset()  # of the copied ones: null is a value, not silence
    lacks: frozenset[str] = frozenset()  # common settings that its argument class has no field for
    tied: bool | None = None  # the only kind of head that mlx-lm computes
    norm_eps: float = 1e-6  # of a configuration that states none
    experts_field: str = "num_experts"
    same: Mapping[str, str] = field(default_factory=dict)  # its own names for what other settings say
    classes: tuple[str, str] = ("Model", "ModelArgs")  # of the text model, and of its arguments
    witness: str | None = None  # a layer's tensor that tells mlx-lm how all of them are stored
    norm: str = "norm"  # what it calls the norm after the last layer
    rotations: Rotations = Rotations.ONE
    nests_rotation: bool = False  # it reads a rotation from `rope_parameters`, or its own default of these
    rotated: float = 1.0  # the part of a head that is rotated, of a configuration that states none
    windows: Windows = Windows.NONE
    attending: int = 0  # every so many layers one attends, among those with a state, if no list says so
    states: States = States.NONE
    wide_heads: bool = False  # layers that see everything may have larger heads, and fewer of them for keys
    returned: int = 0  # what its layers return beside hidden states
    groups_scores: bool = False  # scores are [rows, key heads, group, tokens, positions] when heads share keys
    transposed: tuple[str, ...] = ()  # matrices that transformers stores [in, out], within a layer, and no `.weight`
    stacks: Stacks | None = None  # experts that mlx-lm would not put in order itself
    raised: tuple[str, ...] = ()  # vectors of which only differences count, and that must not be negative
