"""Inputs that each layer has for itself, beside what the layer before gives it.

They follow from token ids and the embedding, for all layers at once, so the first stage makes them and the others
take them from the wire. Knows the names by which `transformers` models of this kind are told.
"""

from __future__ import annotations

from typing import Any

import torch

from cluster.types import LayerRange

_MAKERS = ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")


def takes_inputs(model: torch.nn.Module) -> bool:
    """Whether the model's layers have inputs of their own."""
    return bool(getattr(model.config, "hidden_size_per_layer_input", 0))


class InputMaker:
    """What makes them, and what hands them to a slice's layers."""

    def __init__(self, body: Any, layers: LayerRange) -> None:
        self._body = body
        self._layers = layers
        self._projected = body.project_per_layer_inputs
        # They come to the model finished, wherever they were made.
        body.project_per_layer_inputs = _as_they_are
        if layers.first > 0:
            for name in _MAKERS:
                setattr(body, name, None)

    def make(self, ids: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """[1, tokens, all layers, width] of ids [1, tokens] and their embeddings."""
        inputs: torch.Tensor = self._projected(embedded, self._body.get_per_layer_inputs(ids))
        return inputs

    def owned(self, inputs: torch.Tensor) -> torch.Tensor:
        """Those of the slice's layers."""
        return inputs[:, :, self._layers.first : self._layers.last]


def _as_they_are(embedded: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return inputs
