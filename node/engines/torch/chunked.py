"""Llama 4's own: attention within chunks, queries that grow with their position, experts that every token visits.

Its library masks chunks outside of the attention function, counts a query's position within the batch, and gives every
expert every token. Here a layer says what it does, and attention does it by each sequence's positions; an expert
computes the tokens that chose it, which changes no number, because the others came as zeros. Knows the attribute names
by which `transformers` modules of this kind are told.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

_TUNING, _CHUNK = "potluck_tuning", "potluck_chunk"


def prepare(model: Any) -> None:
    """Before the model is cut: its layers are still counted as its configuration counts them."""
    for module in model.modules():
        if hasattr(module, "attn_temperature_tuning"):
            if model.config.layer_types[module.layer_idx] == "chunked_attention":
                setattr(module, _CHUNK, int(model.config.attention_chunk_size))
            if module.attn_temperature_tuning and not module.use_rope:
                setattr(module, _TUNING, (float(module.floor_scale), float(module.attn_scale)))
            module.attn_temperature_tuning = False
        elif type(module).__name__ == "Llama4TextMoe":
            module.forward = partial(_forward, module)
            module.experts.is_transposed = True  # as other modules whose stacks are [experts, inputs, outputs] say


def chunk_of(module: torch.nn.Module) -> int | None:
    """How long the chunks are within which the layer attends; None: it attends in other ways."""
    return getattr(module, _CHUNK, None)


def is_tuned(module: torch.nn.Module) -> bool:
    """Whether its queries grow with their positions."""
    return hasattr(module, _TUNING)


def tuned(module: torch.nn.Module, query: torch.Tensor, start: int) -> torch.Tensor:
    """Queries [heads, tokens, size] at positions from `start`, as long as their positions make them."""
    floor, scale = getattr(module, _TUNING)
    positions = torch.arange(start, start + query.shape[1], device=query.device, dtype=torch.float32)
    lengths = torch.log1p(torch.floor((positions + 1.0) / floor)) * scale + 1.0
    return (query * lengths[:, None]).to(query.dtype)


def _forward(module: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's own forward, expert by expert; returns [tokens, hidden] and the router's logits, as it does."""
    tokens = hidden_states.reshape(-1, module.hidden_dim)
    scores, logits = module.router(tokens)
    output = module.shared_expert(tokens)
    experts = module.experts
    # A score of zero is one of an expert that was not chosen. Asked once, because a device has to be waited for.
    chosen: dict[int, list[int]] = {}
    for row, expert in scores.nonzero().tolist():
        chosen.setdefault(expert, []).append(row)
    for expert, places in chosen.items():
        rows = torch.tensor(places, device=tokens.device)
        entering = tokens[rows] * scores[rows, expert, None]
        gate, up = (entering @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        output.index_add_(0, rows, (up * experts.act_fn(gate)) @ experts.down_proj[expert])
    return output, logits
