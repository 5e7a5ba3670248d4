"""What a deployment is asked to promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cluster.errors import UsageError
from cluster.limits import SEQUENCES_MAX
from cluster.models.facts import ModelFacts
from cluster.types import NodeId

CONTEXT_STEP: Final = 256
"""An automatic context is a multiple of this: engines allocate caches in such steps, and people read round numbers."""

AUTO_CONTEXT_MIN: Final = 8192
"""Less context than this is not chosen silently: a chat with a document in it already needs as much."""


@dataclass(frozen=True, slots=True)
class Ask:
    """`context` tokens for each of `users` sequences at once; None is the largest context that fits."""

    context: int | None
    users: int = 1
    stages_min: int = 1  # at least so many nodes get a stage
    first: NodeId | None = None  # the node beside the coordinator: stage 0, if it gets one and that fits

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 1:
            raise UsageError(f"expected a context of at least 1 token, found {self.context}")
        if not 1 <= self.users <= SEQUENCES_MAX:
            raise UsageError(f"expected 1 to {SEQUENCES_MAX} users, found {self.users}")
        if self.stages_min < 1:
            raise UsageError(f"expected at least 1 node, found {self.stages_min}")


def context_choices(facts: ModelFacts, ask: Ask) -> range:
    """The contexts that would do, ascending: the one asked for, or all that `auto` may take. The model's own context
    caps the last one, which matters only to models whose own is no multiple of CONTEXT_STEP."""
    own = facts.context_tokens
    if ask.context is not None:
        if ask.context > own:
            raise UsageError(f"expected a context of at most {own} tokens, the model's own, found {ask.context}")
        return range(ask.context, ask.context + 1)
    return range(min(AUTO_CONTEXT_MIN, own), own + CONTEXT_STEP, CONTEXT_STEP)
