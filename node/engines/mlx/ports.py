"""Where a forward of an `mlx-lm` model takes in, and lets out, what is neither its argument nor its result.

Knows the names by which mlx-lm's models make inputs that each layer has for itself: from token ids and the embedding,
for all layers at once. So the first stage makes them and the others take them from the wire.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

_MAKERS = ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")


class Ports:
    """What goes into and comes out of a forward besides its arguments and its result."""

    def __init__(self) -> None:
        self.entering: mx.array | None = None  # [rows, tokens, hidden]
        self.leaving: mx.array | None = None  # [rows, tokens, hidden]
        self.inputs: mx.array | None = None  # [rows, tokens, all layers, width] where layers have inputs of their own
        self.drawing: mx.array | None = None  # the rows whose last position is asked for


def cut_inputs(body: Any, ports: Ports, is_first: bool) -> None:
    """Keep on the first stage alone what makes layers' own inputs; elsewhere they enter."""
    if is_first:
        made = body._project_per_layer_inputs

        def make(embedded: mx.array, looked_up: mx.array) -> mx.array:
            ports.inputs = made(embedded, looked_up)
            return ports.inputs

        body._project_per_layer_inputs = make
    else:
        for name in _MAKERS:
            setattr(body, name, nn.Identity())
        body._get_per_layer_inputs = lambda ids, embedded: None
        body._project_per_layer_inputs = lambda embedded, looked_up: ports.inputs
