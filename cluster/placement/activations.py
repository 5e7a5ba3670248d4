"""What the largest step needs beside weights and cache: what layers make on the way, masks and scores, logits.

Owns: that formula for each engine. Its numbers are of what the engines hold at once, counted tensor by tensor over the
families, small and wide; `tests/oracle/test_memory.py` holds real peaks to it. What the process itself takes (the
interpreter, libraries, a CUDA context) is not in it: nodes leave that out of their budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

from cluster.limits import (
    RECORDED_BYTES_MAX,
    STEP_ROWS_MAX,
    STEP_TOKENS_MAX,
    UNPACKED_BYTES_MAX,
    UNPACKED_ON_CPU_BYTES_MAX,
)
from cluster.models.facts import ModelFacts
from cluster.quantities import MIB
from cluster.types import Backend, DType

_ATTENTION_QUERIES: Final = 512
"""torch attends in blocks of so many queries, each with a mask as wide as the context."""


@dataclass(frozen=True, slots=True)
class _Held:
    """What an engine holds at once, for each token and in the model's own type, at the widest place of a layer."""

    attention: int  # times queries, keys and values: these, and the same while they are rotated
    mlp: int  # times the MLP's inner state: gate, up and what becomes of them
    experts: int  # the same where experts compute a part of it
    routed: int  # times hidden states, once for each expert of a token: sorted to the experts, and back
    scores: int  # elements that may be written to memory in one piece
    scores_bytes: int  # of each, where they are written in float32; they are rounded to the model's own type besides
    scores_copies: int  # in the model's own type, where they are not
    lingering: int  # times queries, keys and values, and the scores once, while a dense MLP computes
    widened: int  # times hidden states in 16 bits, whose norms are computed in float32


_HELD: Final = {
    Backend.TORCH: _Held(
        attention=3,
        mlp=3,
        experts=4,
        routed=4,
        scores=1 << 23,
        scores_bytes=4,
        scores_copies=0,
        lingering=0,
        widened=0,
    ),
    # Functions are not fused on the CPU, and MLX allocates for what comes next while it still computes: what they leave
    # on the way counts, a gate's sigmoid, for one.
    Backend.MLX: _Held(
        attention=6,
        mlp=3,
        experts=5,
        routed=6,
        scores=1 << 23,
        scores_bytes=0,
        scores_copies=3,
        lingering=4,
        widened=9,
    ),
}

_HIDDEN: Final = 6
"""Hidden states: what entered, the residual stream before and after attention, its norm; the frame that leaves; and
what the library keeps for itself."""


COMPILED_BYTES: Final = 4 * MIB
"""What torch's libraries keep on a processor of products that they compiled for 16 bits, whatever the model."""


def activation_bytes(
    facts: ModelFacts, backend: Backend, is_last: bool, *, context: int, users: int, on_cpu: bool
) -> int:
    """Bytes of the largest step: hidden states throughout, and the most of what attention, the MLP and the head need
    one after another. No step has more new tokens than the cache has room for. What else than hidden states crosses a
    boundary counts eight times: 7.3 were measured where it is made, up to 5.2 behind that."""
    held, tokens = _HELD[backend], min(STEP_TOKENS_MAX, context * users)
    beside = sum(prod(tensor.shape) for tensor in facts.boundary[1:])
    made = tokens * facts.dtype.size_bytes  # for each element of a token
    hidden = _HIDDEN + (held.widened if facts.dtype.size_bytes < DType.F32.size_bytes else 0)
    scores = _scores(facts, backend, tokens, context, users)
    attention = (held.attention + min(1, facts.extra_copies)) * facts.attention_width * made + scores
    # Rows that draw have logits, and a copy of them on the way to the host.
    logits = 2 * 4 * min(STEP_ROWS_MAX, tokens) * facts.vocab_size if is_last else 0
    return (
        _product_bytes(facts, backend, on_cpu)
        + (hidden * facts.hidden_size + 8 * beside) * made
        + max(attention, _mlp(facts, held, made, scores), logits)
    )


def _product_bytes(facts: ModelFacts, backend: Backend, on_cpu: bool) -> int:
    """What computing takes beside what goes in and comes out: on torch a part of a packed matrix in full precision,
    products themselves, and steps recorded on a GPU. MLX multiplies with packed matrices as they are."""
    if backend is Backend.MLX:
        return 0
    if not on_cpu:
        return RECORDED_BYTES_MAX + (UNPACKED_BYTES_MAX if facts.quantization else 0)
    unpacked = UNPACKED_ON_CPU_BYTES_MAX if facts.quantization else 0
    return unpacked + (COMPILED_BYTES if facts.dtype is not DType.F32 else 0)


def _mlp(facts: ModelFacts, held: _Held, made: int, scores: int) -> int:
    """While experts compute and tokens are sorted to them, or the dense MLP computes."""
    if facts.experts_used:
        routed = facts.experts_used * facts.hidden_size
        inner = (held.experts + facts.extra_copies) * facts.mlp_width + routed
        return max(inner, (held.routed + min(1, facts.extra_copies)) * routed) * made
    inner = (held.mlp + facts.extra_copies) * facts.mlp_width + held.lingering * facts.attention_width
    return inner * made + (scores // held.scores_copies if held.lingering else 0)


def _scores(facts: ModelFacts, backend: Backend, tokens: int, context: int, users: int) -> int:
    """Scores where they are written, in pieces of some queries and one query at least; else torch's masks."""
    held = _HELD[backend]
    match backend:
        case Backend.TORCH:
            queries = min(_ATTENTION_QUERIES, context)
            block = facts.scores_heads * queries * context
            piece = max(held.scores, facts.scores_heads * context)
            rounded = 0 if facts.dtype is DType.F32 else facts.dtype.size_bytes
            return 4 * queries * context + (held.scores_bytes + rounded) * min(block, piece)
        case Backend.MLX:
            # Decode rows attend in one piece, each to its own past.
            whole = facts.heads * tokens * context
            piece = whole if facts.whole_scores else max(held.scores, facts.heads * context * users)
            return held.scores_copies * facts.dtype.size_bytes * min(whole, piece)
