"""Latent attention (MLA): all heads' keys and values follow from one small latent for each token.

Only that latent and the shared rotated key are cached. Queries are brought into the latents' space instead, and
what attention finds there is brought back, so that a context's keys and values never exist in full. Knows the
attribute names by which `transformers` modules of this kind are told; attention itself is `attention`'s.
"""

from __future__ import annotations

import torch

from cluster.errors import ModelError


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
    query = torch.cat((query[0, :, :, :plain] @ _expansion(module)[:, :plain], query[0, :, :, plain:]), dim=-1)
    return query[None], torch.cat((latents, rotated), dim=-1)


def out_of_latents(module: torch.nn.Module, found: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, value] of [tokens, heads, rank + rotated]. Attention weighed whole cached rows, because values
    that are narrower than keys would be a copy of them; the rotated part means nothing here."""
    weights = _expansion(module)
    latents = found[..., : weights.shape[2]].transpose(0, 1)
    return (latents @ weights[:, module.qk_nope_head_dim :].transpose(1, 2)).transpose(0, 1)


def _expansion(module: torch.nn.Module) -> torch.Tensor:
    """[heads, plain + value, rank]: what makes a head's key and value of a latent. A view, not a copy."""
    weight = module.kv_b_proj.weight
    return weight.view(module.num_heads, -1, weight.shape[1])
