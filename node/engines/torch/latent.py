"""Latent attention (MLA): all heads' keys and values follow from one small latent for each token.

Only that latent and the shared rotated key are cached. Queries are brought into the latents' space instead, and
what attention finds there is brought back, so that a context's keys and values never exist in full. Knows the
attribute names by which `transformers` modules of this kind are told; attention itself is `attention`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cluster.errors import ModelError
from node.engines.torch.products import Whole


def is_latent(module: torch.nn.Module) -> bool:
    """Whether the attention module is of this kind."""
    return hasattr(module, "kv_lora_rank")


def keep_latents(model: torch.nn.Module) -> None:
    """Let every such module hand its latents to the attention function as they are, in place of keys and values."""
    for module in model.modules():
        if is_latent(module):
            if not hasattr(module, "expand_kv"):
                raise ModelError(
                    f"the torch engine finds no expand_kv in {type(module).__name__} (latent attention); "
                    "install the version of transformers that `potluck doctor` asks for"
                )
            module.expand_kv = _as_they_are


def _as_they_are(latents: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return latents, rotated


def into_latents(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, tokens, plain + rotated]
    latents: torch.Tensor,  # [1, 1, tokens, rank]
    rotated: torch.Tensor,  # [1, 1, tokens, rotated]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one shared head, [1, heads or 1, tokens, rank + rotated]: their products are the scores.

    A key is W latent, so a query's product with it is (query W) latent.
    """
    plain = query.shape[-1] - rotated.shape[-1]
    query = torch.cat((_into(module, query[0, :, :, :plain]), query[0, :, :, plain:]), dim=-1)
    return query[None], torch.cat((latents, rotated), dim=-1)


def out_of_latents(module: torch.nn.Module, found: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, value] of [tokens, heads, rank + rotated]. Attention weighed whole cached rows, because values
    that are narrower than keys would be a copy of them; the rotated part means nothing here."""
    weight = module.kv_b_proj.weight
    latents = found[..., : weight.shape[1]].transpose(0, 1)
    match weight:
        case Halves():
            outputs = [values.product(latents[head]) for head, values in enumerate(weight.values)]
        case Whole():
            outputs = [latents[head] @ part[module.qk_nope_head_dim :].T for head, part in _heads(module, weight)]
        case _:
            weights = _expansion(module, weight)
            return (latents @ weights[:, module.qk_nope_head_dim :].transpose(1, 2)).transpose(0, 1)
    return torch.stack(outputs, dim=1)


class Halves:
    """What makes keys and values of latents, apart and for each head, as mlx-lm packs them."""

    def __init__(self, keys: Sequence[Whole], values: Sequence[Whole]) -> None:
        self.keys, self.values = tuple(keys), tuple(values)  # [rank, plain] and [value, rank] each
        rank, plain = keys[0].shape
        self.shape = (len(keys) * (plain + values[0].shape[0]), rank)

    @property
    def nbytes(self) -> int:
        """All that they keep in memory."""
        return sum(half.nbytes for half in (*self.keys, *self.values))


def _into(module: torch.nn.Module, query: torch.Tensor) -> torch.Tensor:
    """[heads, tokens, rank] of [heads, tokens, plain]."""
    plain, weight = query.shape[-1], module.kv_b_proj.weight
    match weight:
        case Halves():
            return torch.stack([keys.product(query[head]) for head, keys in enumerate(weight.keys)])
        case Whole():
            return torch.stack([query[head] @ part[:plain] for head, part in _heads(module, weight)])
        case _:
            return query @ _expansion(module, weight)[:, :plain]


def _heads(module: torch.nn.Module, weight: Whole) -> Iterator[tuple[int, torch.Tensor]]:
    """[plain + value, rank] of each head, unpacked one after another."""
    rows = weight.shape[0] // module.num_heads
    for head in range(module.num_heads):
        yield head, weight.unpacked(head * rows, (head + 1) * rows)


def _expansion(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """[heads, plain + value, rank]: what makes a head's key and value of a latent. A view, not a copy."""
    return weight.view(module.num_heads, -1, weight.shape[1])
