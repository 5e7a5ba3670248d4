"""The attention function that the sliced models call instead of their own.

A step packs the new tokens of many sequences into one row of tokens; here each sequence finds its own part
again, writes its keys and values into our cache and attends to its own past: causal, within a sliding window
where the layer has one, with soft-capped scores or attention sinks where it has these. Anything else that a model
asks of its attention is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cluster.errors import ModelError
from node.engines.torch import chunked, latent, shared
from node.engines.torch.kv import LayerState, SequenceCache
from node.engines.torch.ragged import DecodeRows
from node.engines.torch.scoring import Scoring

NAME = "potluck"
BATCH_KEYWORD = "potluck_batch"
_MANNER = "potluck_manner"

_QUERIES_MAX = 512
"""Queries in one call where a mask is needed: the mask has this many rows as wide as the context."""

_SCORES_MAX = 1 << 23
"""Scores in one call where they are written to memory: some queries, all heads, the whole context."""

_IGNORED = frozenset({"position_ids", "use_cache", "output_attentions", "output_router_logits"})
"""Keywords that models pass along and that change nothing for a causal decoder (positions are in the queries)."""


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence's part of the packed tokens: [begin, end) of the batch at positions from `start`. `states` are those
    that the step leaves behind, by layer; `offered` is what layers without keys of their own attend to, by kind."""

    begin: int
    end: int
    start: int
    cache: SequenceCache
    states: dict[int, LayerState] = field(default_factory=dict)
    offered: dict[str, shared.Cached] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step attends to: first all rows of `decode` at once, then each span to its own past. `attended` lists
    the layers that came here, for the rehearsal after a load."""

    spans: tuple[Span, ...]
    attended: list[int] = field(default_factory=list)
    decode: DecodeRows | None = None

    def parts(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each span's own of [heads, tokens, size]; in one call, because there are many."""
        if self.decode is not None:
            tensor = tensor[:, self.decode.count :]
        return (tensor,) if len(self.spans) == 1 else tensor.split([span.end - span.begin for span in self.spans], 1)


@dataclass(frozen=True, slots=True)
class _Manner:
    """What a layer does unlike others. Looked up once: a module takes long to say what it does not have."""

    is_latent: bool = False
    shares: bool = False  # attends to the keys of an earlier layer
    offers: bool = False  # later layers attend to its keys
    chunk: int | None = None
    is_tuned: bool = False  # its queries grow with their positions


_PLAIN = _Manner()


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, tokens, head size], rotated already
    key: torch.Tensor,  # [1, kv heads, tokens, head size]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Attend each sequence of the batch to its own past; returns [1, tokens, heads, head size]."""
    batch = others.pop(BATCH_KEYWORD)
    assert isinstance(batch, Batch)
    refuse_unknown(module, attention_mask, dropout, others)
    layer, manner = int(module.layer_idx), _manner(module)
    batch.attended.append(layer)
    scoring = Scoring(sliding_window, scaling, softcap, s_aux)
    at_once = [_attend_at_once(batch.decode, module, (query[0], key[0], value[0]), scoring)] if batch.decode else []
    if not batch.spans:
        return at_once[0][None], None
    if manner.is_latent:
        query, key = latent.into_latents(module, query, key, value)
        value = key[..., :0]  # nothing to cache beside the latents
    _refuse_other_window(batch, layer, sliding_window or manner.chunk)
    parts = zip(batch.spans, *map(batch.parts, (query[0], key[0], value[0])), strict=True)
    rows = [_attend_span(module, manner, span, new, scoring) for span, *new in parts]
    output = (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)).transpose(0, 1)
    output = torch.cat((*at_once, output)) if at_once else output
    return (latent.out_of_latents(module, output) if manner.is_latent else output)[None], None


def _attend_at_once(
    decode: DecodeRows, module: torch.nn.Module, new: Sequence[torch.Tensor], scoring: Scoring
) -> torch.Tensor:
    """The rows of one token, which are the first of queries, keys and values; [rows, heads, size]."""
    if _manner(module) != _PLAIN:
        raise ModelError(f"{type(module).__name__} attends in a way that no kernel for many rows knows")
    query, key, value = (tensor[:, : decode.count] for tensor in new)
    return decode.attended(int(module.layer_idx), query, key, value, scoring)


def _manner(module: torch.nn.Module) -> _Manner:
    known = module.__dict__.get(_MANNER)
    if not isinstance(known, _Manner):
        known = _Manner(
            latent.is_latent(module),
            shared.shares(module),
            shared.offers(module),
            chunked.chunk_of(module),
            chunked.is_tuned(module),
        )
        setattr(module, _MANNER, known)
    return known


def _attend_span(
    module: torch.nn.Module, manner: _Manner, span: Span, new: Sequence[torch.Tensor], scoring: Scoring
) -> torch.Tensor:
    """The new tokens of one sequence, queries, keys and values of [heads or kv heads, new, size]; like the queries."""
    query, key, value = new
    if manner.shares:
        keys, values, first = shared.borrow(module, span.offered)
    else:
        keys, values, first = span.cache.write(int(module.layer_idx), span.start, key, value)
        if manner.offers:
            shared.offer(module, (keys, values, first), span.offered)
    if manner.is_tuned:
        query = chunked.tuned(module, query, span.start)
    values = keys if manner.is_latent else values
    if manner.chunk is None:
        return _attend_sequence(query, keys, values, span.start - first, scoring)
    return _attend_chunks(query, keys, values, (first, span.start), manner.chunk, scoring)


def _attend_chunks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: tuple[int, int],  # of the first key and of the first new token
    chunk: int,
    scoring: Scoring,
) -> torch.Tensor:
    """As `_attend_sequence`, each token within its own chunk: [chunk * n, chunk * (n + 1)) for some n."""
    first, start = positions
    end = first + keys.shape[1]
    rows = []
    for begin in range(start // chunk * chunk, end, chunk):
        new = slice(max(begin, start), min(begin + chunk, end))
        seen = slice(begin - first, new.stop - first)
        queries = query[:, new.start - start : new.stop - start]
        rows.append(_attend_sequence(queries, keys[:, seen], values[:, seen], new.start - begin, scoring))
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _attend_sequence(
    query: torch.Tensor,  # [heads, new tokens, head size]
    keys: torch.Tensor,  # [kv heads, tokens, head size], the new ones last
    values: torch.Tensor,
    start: int,  # of the new ones among the keys
    scoring: Scoring,
) -> torch.Tensor:
    """One sequence's new tokens, in blocks so that masks and scores stay small; [heads, new tokens, head size]."""
    heads, new_tokens, _ = query.shape
    written = scoring.softcap is not None or scoring.sinks is not None
    attend_block = _attend_written if written else _attend_fused
    if new_tokens == 1:
        return attend_block(query, keys, values, start, scoring)
    size = min(_QUERIES_MAX, max(1, _SCORES_MAX // (heads * keys.shape[1]))) if written else _QUERIES_MAX
    blocks = []
    for begin in range(0, new_tokens, size):
        end = min(begin + size, new_tokens)
        seen = start + end
        blocks.append(attend_block(query[:, begin:end], keys[:, :seen], values[:, :seen], start + begin, scoring))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _attend_fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scoring: Scoring
) -> torch.Tensor:
    heads, count, size = query.shape
    kv_heads, end, _ = keys.shape
    window, oldest = scoring.window, _oldest(start, scoring.window)
    if oldest > 0:
        keys, values = keys[:, oldest:], values[:, oldest:]
    group = heads // kv_heads
    if count == 1:
        # The heads that share keys become rows of one query, so each key is read once and never repeated.
        grouped = query.reshape(1, kv_heads, group, size)
        output = scaled_dot_product_attention(grouped, keys.unsqueeze(0), values.unsqueeze(0), scale=scoring.scaling)
        return output.reshape(heads, 1, -1)
    whole = start == 0 and (window is None or count <= window)
    result = scaled_dot_product_attention(
        query.reshape(kv_heads, group, count, size),
        keys[:, None].expand(-1, group, -1, -1),  # a view: strides of zero
        values[:, None].expand(-1, group, -1, -1),
        attn_mask=None if whole else _mask(start, count, oldest, end, window, query.device),
        is_causal=whole,
        scale=scoring.scaling,
    )
    return result.reshape(heads, count, -1)


def _attend_written(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scoring: Scoring
) -> torch.Tensor:
    """The same with scores in memory, in float32: nothing fused computes soft-caps and sinks."""
    heads, count, size = query.shape
    kv_heads, end, _ = keys.shape
    oldest = _oldest(start, scoring.window)
    keys, values = keys[:, oldest:], values[:, oldest:]
    scores = (query.reshape(kv_heads, -1, size) @ keys.transpose(1, 2)).float()
    scores *= size**-0.5 if scoring.scaling is None else scoring.scaling
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    scores = scores.view(heads, count, -1)
    if count > 1:
        scores.masked_fill_(~_mask(start, count, oldest, end, scoring.window, query.device), -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    if scoring.sinks is not None:
        sinks = scoring.sinks.float()[:, None, None]
        largest = torch.maximum(largest, sinks)
    total = scores.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    if scoring.sinks is not None:
        total += (sinks - largest).exp_()
    weights = scores.div_(total).to(values.dtype)
    return (weights.view(kv_heads, -1, weights.shape[2]) @ values).view(heads, count, -1)


def _oldest(start: int, window: int | None) -> int:
    """The first query of a block sees least of the past; nothing in the block sees anything older."""
    return 0 if window is None else max(0, start - window + 1)


def _mask(start: int, count: int, oldest: int, end: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries, keys], true where the query may look."""
    query_positions = torch.arange(start, start + count, device=device)[:, None]
    key_positions = torch.arange(oldest, end, device=device)[None]
    mask = key_positions <= query_positions
    if window is not None:
        mask &= key_positions > query_positions - window
    return mask


def _refuse_other_window(batch: Batch, layer: int, window: int | None) -> None:
    """What the layer looks back to is what is kept of it; of every sequence alike."""
    kept = batch.spans[0].cache.window(layer)
    if kept != window:
        raise ModelError(
            f"layer {layer} of the stage looks back {window} positions; config.json says {kept} (None: all)"
        )


def refuse_unknown(module: torch.nn.Module, mask: object, dropout: float, others: dict[str, object]) -> None:
    """Raise ModelError when a layer asks for more than its kind is known to need."""
    unknown = {name: others[name] for name in others.keys() - _IGNORED if others[name] is not None}
    if mask is not None:
        unknown["attention_mask"] = mask
    if dropout:
        unknown["dropout"] = dropout
    if not getattr(module, "is_causal", True):
        unknown["is_causal"] = False
    if unknown:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(sorted(unknown))}, "
            "which the torch engine does not compute; use a model without it"
        )


AttentionInterface.register(NAME, attend)
