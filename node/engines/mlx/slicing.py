"""Cutting a stage's part out of an `mlx-lm` model: their code, our layers only.

The model's own loop runs over all its layers. Those that the stage does not own are replaced by stand-ins: the
one before the first owned layer hands in what came over the wire, the one after the last takes out what leaves,
the others pass through. MLX computes only what somebody reads, so nothing before or after costs anything. Owned
layers stay at their own index, because models tell kinds of layers apart by it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache
from mlx_lm.models.rope_utils import YarnRoPE

from cluster.errors import ModelError
from cluster.rewinding import Rewind, rewind_of
from cluster.types import LayerRange
from node.engines.mlx.arguments import Arguments
from node.engines.mlx.attention import attend_in_blocks
from node.engines.mlx.chunked import ChunkedAttention, Front
from node.engines.mlx.family import Windows
from node.engines.mlx.ports import Ports, cut_inputs
from node.engines.mlx.positions import LayerKind, Positions, unowned


def _answer_like(module: nn.Module, original: nn.Module) -> None:
    for name, value in vars(original).items():
        if not name.startswith("_"):
            setattr(module, name, value)


class _StandIn(nn.Module):
    """In the place of a layer. It still answers what the model's loop asks its layers (`use_sliding`, for one), and
    returns as much."""

    def __init__(self, original: nn.Module, ports: Ports, returned: int) -> None:
        super().__init__()
        self._ports, self._beside = ports, (None,) * returned
        _answer_like(self, original)


class _Passing(_StandIn):
    """An unowned layer."""

    def __call__(self, x: mx.array, *_: object, **__: object) -> Any:
        return (self._pass(x), *self._beside) if self._beside else self._pass(x)

    def _pass(self, x: mx.array) -> mx.array:
        return x


class _Entering(_Passing):
    """The layer before the first owned one: its output is what the stage before sent."""

    def _pass(self, x: mx.array) -> mx.array:
        assert self._ports.entering is not None
        return self._ports.entering


class _Leaving(_Passing):
    """The layer after the last owned one: its input is what this stage sends."""

    def _pass(self, x: mx.array) -> mx.array:
        self._ports.leaving = x
        return x


class _NoEmbedding(nn.Module):
    """An unowned embedding: zeros of the right shape, which nobody computes; as a tied head, nothing at all."""

    def __init__(self, hidden_size: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self._hidden_size, self._dtype = hidden_size, dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.zeros((*tokens.shape, self._hidden_size), self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return x


class _Masked(nn.Module):
    """An owned layer whose model makes one mask for all layers, or one that does not fit a batch: it takes the mask
    of its own cache instead."""

    def __init__(self, original: nn.Module, *, grouped: bool) -> None:
        super().__init__()
        _answer_like(self, original)
        self.layer = original
        self._grouped = grouped  # scores are [rows, key heads, group, tokens, positions]

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any) -> Any:
        cache = cache.cache if isinstance(cache, Front) else cache
        own = cache.make_mask(x.shape[1], return_array=isinstance(mask, mx.array))
        return self.layer(x, own[:, None] if self._grouped else own, cache)


class _DrawnNorm(nn.Module):
    """The final norm, and with it the head, at the last position of the drawing rows only: logits of a whole
    prompt would take gigabytes."""

    def __init__(self, norm: nn.Module, ports: Ports) -> None:
        super().__init__()
        self.norm = norm
        self._ports = ports

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(x[self._ports.drawing, -1:])


@dataclass(frozen=True, slots=True)
class Piece:
    """One forward's rows, all of the same number of new tokens."""

    tokens: mx.array  # [rows, tokens] ids
    entering: tuple[mx.array, ...]  # the boundary's tensors, [rows, tokens, ...] each; none on the first stage
    drawing: tuple[int, ...]  # rows to draw after


class SlicedModel:
    """Layers [first, last) of a model, with the embedding, final norm and head that belong to them."""

    def __init__(self, model: Any, arguments: Arguments, layers: LayerRange, dtype: mx.Dtype) -> None:
        self.model = model
        self.layers = layers
        self.vocab_size = arguments.shape.vocab_size
        self.hidden_size = arguments.shape.hidden_size
        self.kinds = _kinds(model, arguments)
        self.is_last = layers.last == len(self.kinds)
        self._norm = arguments.family.norm
        self._masks = _masks_needed(arguments)
        self._ports = Ports()
        _cut(model, self._ports, layers, _NoEmbedding(self.hidden_size, dtype), arguments)

    @property
    def rewind(self) -> Rewind:
        """Where sequences can be cut back to: by all layers of the model, owned or not."""
        return rewind_of([kind.window for kind in self.kinds], has_states=any(kind.states for kind in self.kinds))

    def seal(self) -> None:
        """After the weights are bound by name: layers get their masks; norm and head see only what is drawn."""
        if self._masks:
            layers = self.model.model.layers
            for index in self.layers:
                if self._masks.norm_eps is not None:
                    layers[index].self_attn = ChunkedAttention(layers[index].self_attn, self._masks.norm_eps)
                layers[index] = _Masked(layers[index], grouped=self._masks.grouped)
        if self.is_last:
            body = self.model.model
            setattr(body, self._norm, _DrawnNorm(getattr(body, self._norm), self._ports))

    def caches(self, positions: Positions, owned: Sequence[object]) -> list[object]:
        """One cache for each layer of the model: `owned` where the stage has the layer and it keeps something (those
        that do not are the last of a stage). One more at the end, because a model without layers that see everything
        still asks for a mask of theirs."""
        caches: list[object] = [unowned(positions, kind) for kind in (*self.kinds, LayerKind())]
        caches[self.layers.first : self.layers.first + len(owned)] = owned
        return caches

    def forward(self, piece: Piece, caches: Sequence[object]) -> tuple[mx.array, ...]:
        """What leaves the stage: the boundary's tensors, or [drawing rows, vocabulary] on the last one. Lazy."""
        ports = self._ports
        ports.entering, ports.inputs = (*piece.entering, None, None)[:2]
        # An empty choice of rows is no shape for a model; the logits of row 0 are never computed then.
        ports.drawing = mx.array(piece.drawing or (0,))
        try:
            chunked = self._masks is not None and self._masks.norm_eps is not None
            output: mx.array = self.model(piece.tokens, cache=[Front(cache) if chunked else cache for cache in caches])
            if self.is_last:
                return (output[:, 0],)
            assert ports.leaving is not None
            return (ports.leaving,) if ports.inputs is None else (ports.leaving, ports.inputs)
        finally:
            ports.entering = ports.inputs = ports.leaving = ports.drawing = None


def build_model(arguments: Arguments) -> Any:
    """The whole model with parameters that nobody computes: MLX is lazy, so it takes no memory."""
    module = importlib.import_module(f"mlx_lm.models.{arguments.module}")
    model_class, arguments_class = (getattr(module, name) for name in arguments.family.classes)
    try:
        model = model_class(arguments_class(**arguments.fields))
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ModelError(f"mlx-lm cannot build a {arguments.module} model from config.json: {error}") from error
    attend_in_blocks(model)
    if arguments.rotation.periods is not None:
        for part in model.modules():
            if type(part) is YarnRoPE:
                part._freqs = mx.array(arguments.rotation.periods, mx.float32)
    return model


@dataclass(frozen=True, slots=True)
class _Masks:
    """What the model's own masks would get wrong."""

    grouped: bool
    norm_eps: float | None = None  # of queries and keys, where attention itself has to be another


def _masks_needed(arguments: Arguments) -> _Masks | None:
    """None when the model's masks are right, as it makes them from the caches that it is given."""
    family, shape = arguments.family, arguments.shape
    grouped = family.groups_scores and shape.heads != shape.kv_heads
    if family.windows is Windows.CHUNKED:
        eps = arguments.fields["rms_norm_eps"]
        assert isinstance(eps, float)
        return _Masks(grouped=False, norm_eps=eps)
    one_for_all = family.windows is Windows.IGNORED and len(set(arguments.windows)) > 1
    return _Masks(grouped) if grouped or one_for_all else None


def _kinds(model: Any, arguments: Arguments) -> tuple[LayerKind, ...]:
    """What each layer remembers, told by the caches that the model would make for itself. The configuration, as
    transformers reads it, has to say the same."""
    caches = model.make_cache() if hasattr(model, "make_cache") else [KVCache() for _ in model.model.layers]
    theirs = tuple(_kind(index, cache, arguments) for index, cache in enumerate(caches))
    sharing = arguments.shape.layer_count - len(caches)
    theirs += tuple(LayerKind(window, shares=True) for window in arguments.windows[len(caches) :])
    if arguments.family.windows in (Windows.IGNORED, Windows.CHUNKED):
        in_chunks = arguments.family.windows is Windows.CHUNKED
        return tuple(LayerKind(window, in_chunks=in_chunks and window is not None) for window in arguments.windows)
    stated = list(zip(arguments.windows, arguments.states, strict=True))
    if sharing != arguments.shape.sharing_layers or [(kind.window, bool(kind.states)) for kind in theirs] != stated:
        raise ModelError(
            f"mlx-lm takes the layers for {theirs}; config.json gives windows {arguments.windows} and "
            f"states {arguments.states}"
        )
    return theirs


def _kind(index: int, cache: Any, arguments: Arguments) -> LayerKind:
    if type(cache) is KVCache:
        return LayerKind()
    if type(cache) is RotatingKVCache and cache.keep == 0 and cache.max_size > 0:
        return LayerKind(window=int(cache.max_size))
    if type(cache) is ArraysCache and arguments.states[index]:
        return LayerKind(states=len(cache.cache))
    raise ModelError(
        f"layer {index} keeps its state in a {type(cache).__name__}, which the MLX engine cannot compute exactly "
        "(it knows attention over all positions or a sliding window, and states of the families that have them)"
    )


def _cut(model: Any, ports: Ports, layers: LayerRange, no_embedding: nn.Module, arguments: Arguments) -> None:
    body, returned = model.model, arguments.family.returned
    for index, original in enumerate(body.layers):
        if index == layers.first - 1:
            body.layers[index] = _Entering(original, ports, returned)
        elif index == layers.last:
            body.layers[index] = _Leaving(original, ports, returned)
        elif index not in layers:
            body.layers[index] = _Passing(original, ports, returned)
    is_first, is_last = layers.first == 0, layers.last == len(body.layers)
    if not (is_first or (is_last and arguments.tied)):
        body.embed_tokens = no_embedding
    if arguments.shape.input_width:
        cut_inputs(body, ports, is_first)
    if not is_last:
        setattr(body, arguments.family.norm, nn.Identity())
        if "lm_head" in model:
            model.lm_head = nn.Identity()
