"""Layers whose past is a state of fixed size: gated delta rules, short convolutions.

Their code is the library's, which computes a batch of equally long sequences and keeps states in a cache of its own.
Here it computes one row at a time, and is given each row's state in the words of its caches. States are values: a
step makes new ones, which count once it has succeeded. Knows nothing of sequences beyond their states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch

from cluster.errors import ModelError
from node.engines.torch import attention
from node.engines.torch.kv import LayerState

_KINDS = frozenset({"conv", "linear_attention"})
_CACHE_KEYWORDS = ("cache_params", "past_key_values")


def run_rows_alone(model: torch.nn.Module) -> None:
    """Let every such layer of the model take a batch apart."""
    for module in model.modules():
        if getattr(module, "layer_type", None) in _KINDS:
            names = inspect.signature(module.forward).parameters
            keyword = next((name for name in _CACHE_KEYWORDS if name in names), None)
            if keyword is None or not hasattr(module, "conv_kernel_size"):
                raise ModelError(f"the torch engine does not know how {type(module).__name__} keeps its state")
            module.forward = partial(_forward, module, module.forward, keyword)


def _forward(
    module: torch.nn.Module,
    forward: Callable[..., torch.Tensor],
    keyword: str,
    hidden_states: torch.Tensor,  # [1, tokens, hidden]
    attention_mask: torch.Tensor | None = None,
    **others: object,
) -> torch.Tensor:
    batch = others.pop(attention.BATCH_KEYWORD)
    assert isinstance(batch, attention.Batch)
    others.pop(keyword, None)
    attention.refuse_unknown(module, attention_mask, 0.0, others)
    layer = int(module.layer_idx)
    batch.attended.append(layer)
    outputs = []
    for span in batch.spans:
        past = _Past(span.cache.state(layer))
        outputs.append(forward(hidden_states=hidden_states[:, span.begin : span.end], **{keyword: past}))
        span.states[layer] = past.state()
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class _Past:
    """One layer's state of one row, as the layer's code reads and writes it."""

    def __init__(self, state: LayerState | None) -> None:
        # Copies, because the library's decode steps change both in place, and a step that fails must not.
        self._window = None if state is None or state.window is None else state.window.clone()
        self._matrix = None if state is None or state.matrix is None else state.matrix.clone()

    def __getattr__(self, name: str) -> object:
        raise ModelError(f"a layer asks the cache of its state for {name}, which the torch engine does not offer")

    def state(self) -> LayerState:
        return LayerState(self._window, self._matrix)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._window

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._matrix

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *, conv_kernel_size: int) -> torch.Tensor:
        """Remember the last inputs; returns all that the convolution has to see, [1, channels, at least kernel]."""
        window = self._window
        if window is None:
            window = conv_states.new_zeros((*conv_states.shape[:2], conv_kernel_size))
        seen = torch.cat((window, conv_states), dim=-1)
        self._window = seen[..., -conv_kernel_size:].clone()
        return seen

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        self._matrix = recurrent_states
        return recurrent_states
