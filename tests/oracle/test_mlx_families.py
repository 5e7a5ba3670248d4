"""The other families on the MLX engine: exactly what mlx-lm computes, and what it leaves out as transformers has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx
from mlx_lm.models import gemma4_text, gpt_oss, ministral3

from cluster.errors import ModelError
from cluster.types import SequenceId
from node.engine import Engine
from node.engines.mlx import arguments, rotations, slicing, weights
from node.engines.mlx.positions import LayerCache
from tests.checkpoints import MORE_FAMILIES, make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.mlx_reference import mlx_reference
from tests.oracle.pipelines import greedy, ragged, run_prefill
from tests.oracle.reference import (
    LAST_TOKENS,
    Reference,
    WholeModel,
    assert_same,
    decisive_reference,
    random_prompt,
)
from tests.oracle.test_mlx_engine import CUTS, assert_equal, assert_ragged_batch_equal, mlx_pipeline

Checkpoints = Callable[[str], Path]

YARN = {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG_ROPE = {
    "original_max_position_embeddings": 128,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 50_000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
        "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    },
}

JUDGED = tuple(family for family in MORE_FAMILIES if family != "llama4")
"""Those that mlx-lm computes exactly; Llama 4 has tests of its own."""

AS_MLX_LM_COMPUTES_THEM: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4096},  # it has no windows
    "gpt_oss": {"rope_parameters": YARN},  # it rounds where the ramp of a yarn rotation begins and ends
}
"""What keeps mlx-lm from being the judge is left out of these checkpoints, and tested with the ones below."""

BEYOND_MLX_LM: dict[str, tuple[str, dict[str, Any]]] = {
    "windows in turns": ("gemma2", {}),
    "a ramp between dimensions": ("gpt_oss", {"rope_parameters": YARN | {"truncate": False}}),
    "windows everywhere": ("mistral", {"sliding_window": 16}),
    "windows beside fused matrices": ("phi3", {"sliding_window": 16}),
    "short factors": ("phi3", LONG_ROPE),
    "groups of experts that lost": ("deepseek_v3", {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2}),
    "queries as they are": ("deepseek_v3", {"q_lora_rank": None}),
    "own inputs and shared keys": ("gemma4_small", {}),
    "wide heads": ("gemma4", {}),
    "growing queries": ("ministral3", {}),
    "short factors beside a tied head": ("phi3", LONG_ROPE | {"tie_word_embeddings": True}),
}
"""transformers is the judge of these."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The checkpoint of a family that mlx-lm computes as transformers does."""

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("plain") / family
        return make_checkpoint(family, folder, **AS_MLX_LM_COMPUTES_THEM.get(family, {}))

    return make


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Reference]]]:
    """A checkpoint with something that mlx-lm leaves out, and continuations by transformers."""

    @cache
    def make(what: str) -> tuple[Path, list[Reference]]:
        family, overrides = BEYOND_MLX_LM[what]
        folder = make_checkpoint(family, tmp_path_factory.mktemp("beyond") / family, **overrides)
        whole = WholeModel(folder)
        return folder, [
            decisive_reference(whole, prompt_tokens=tokens, count=LAST_TOKENS, tolerance=TOLERANCE)
            for tokens in (40, 11)
        ]

    return make


def assert_like_transformers(engines: Sequence[Engine], expected: Sequence[Reference]) -> None:
    found = ragged(engines, [answer.prompt for answer in expected], len(expected[0].ids))
    for (ids, logits), answer in zip(found, expected, strict=True):
        assert len(ids) == len(answer.ids)
        assert_same(ids, logits, answer, tolerance=TOLERANCE)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("family", JUDGED)
def test_greedy_text_and_logits_equal_the_whole_model(family: str, cuts: tuple[int, ...], plain: Checkpoints) -> None:
    expected = mlx_reference(plain(family))
    assert_equal(*greedy(mlx_pipeline(plain(family), cuts), expected.prompt, len(expected.ids)), expected)


@pytest.mark.parametrize("family", JUDGED)
def test_prefill_cuts_give_the_same_logits(family: str, plain: Checkpoints) -> None:
    """A cut after one token and before the last, in the middle, and around a window of 16."""
    expected = mlx_reference(plain(family))
    engines = mlx_pipeline(plain(family), (2, 4))
    for seq, chunks in enumerate([(1,), (39,), (20,), (16, 17), (7, 9, 33)]):
        assert_equal(*greedy(engines, expected.prompt, 2, chunks=chunks, seq=seq), expected)


@pytest.mark.parametrize("family", JUDGED)
def test_rows_of_a_ragged_batch_do_not_see_each_other(family: str, plain: Checkpoints) -> None:
    expected = [mlx_reference(plain(family), prompt_tokens) for prompt_tokens in (5, 23, 40)]
    assert_ragged_batch_equal(mlx_pipeline(plain(family), (3,)), expected, chunk=9)


@pytest.mark.parametrize("what", BEYOND_MLX_LM)
def test_what_mlx_lm_leaves_out_is_computed_as_by_transformers(what: str, beyond: Callable[..., Any]) -> None:
    folder, expected = beyond(what)
    assert_like_transformers(mlx_pipeline(folder, (3,), context_tokens=128), expected)


@pytest.mark.parametrize("family", JUDGED)
def test_a_fork_and_a_cut_continue_as_if_nothing_else_had_happened(family: str, plain: Checkpoints) -> None:
    expected = mlx_reference(plain(family))
    engines = mlx_pipeline(plain(family), (3,))
    one, two = SequenceId(1), SequenceId(2)
    run_prefill(engines, [*expected.prompt[:20], *random_prompt(30, seed=1)], seq=one)
    for engine in engines:
        assert engine.fork(one, two, 19) == 19
        assert engine.trim(one, 20) == 20
    for seq, start in ((one, 20), (two, 19)):
        logits = run_prefill(engines, expected.prompt[start:], seq=seq, start=start)
        assert_equal([int(logits.argmax())], logits[None], expected)


def _no_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "read_windows", lambda family, config, layer_count, where: (None,) * layer_count)


def _masks_of_rows_on_key_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows and two key heads: the shapes fit."""

    def call(self: Any, x: mx.array, mask: Any, cache: Any) -> Any:
        return self.layer(x, cache.make_mask(x.shape[1], return_array=True), cache)

    monkeypatch.setattr(slicing._Masked, "__call__", call)


def _rounded_ramp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotations, "_untruncated_yarn", lambda scaling, theta, dims: None)


def _long_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = rotations._factors
    monkeypatch.setattr(
        rotations, "_factors", lambda stated, name, count, where: factors(stated, "long_factor", count, where)
    )


def _biases_as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_in_order_of_mlx", lambda lazy, family: dict(lazy))


def _no_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = gpt_oss.scaled_dot_product_attention
    monkeypatch.setattr(
        gpt_oss, "scaled_dot_product_attention", lambda *args, sinks, **kwargs: attention(*args, **kwargs)
    )


def _stale_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is not rotated, and only in one step."""
    update = LayerCache.update_and_fetch

    def stale(self: LayerCache, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        late = 42 in self._positions.starts and self._positions.tokens == 1
        return update(self, self.keys[self._positions.rows, :, :1] if late else keys, values)

    monkeypatch.setattr(LayerCache, "update_and_fetch", stale)


def _foreign_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer has the input of the one before it, where they came over the wire."""
    forward = slicing.SlicedModel.forward

    def rolled(self: slicing.SlicedModel, piece: slicing.Piece, caches: Sequence[object]) -> tuple[mx.array, ...]:
        entering = tuple(mx.roll(array, place, axis=2) for place, array in enumerate(piece.entering))
        return forward(self, replace(piece, entering=entering), caches)

    monkeypatch.setattr(slicing.SlicedModel, "forward", rolled)


def _new_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers without keys of their own look at the newest of those that they share, and at no others."""
    attend = gemma4_text.Attention.__call__

    def newest(
        self: Any, x: mx.array, mask: Any = None, cache: Any = None, shared_kv: Any = None, **others: Any
    ) -> Any:
        if shared_kv is not None:
            shared_kv = tuple(mx.where(mx.arange(kv.shape[2])[:, None] == kv.shape[2] - 1, kv, 0) for kv in shared_kv)
        return attend(self, x, mask, cache, shared_kv=shared_kv, **others)

    monkeypatch.setattr(gemma4_text.Attention, "__call__", newest)


def _narrow_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of wide heads that is rotated, as if it were all of them."""
    rotation = rotations._as_stated_by_kind

    def whole(*args: Any) -> rotations.Rotation:
        by_kind: Any = rotation(*args).fields["rope_parameters"]
        return rotations.Rotation(
            {
                "rope_parameters": by_kind
                | {"full_attention": by_kind["full_attention"] | {"partial_rotary_factor": 1.0}}
            }
        )

    monkeypatch.setattr(rotations, "_as_stated_by_kind", whole)


def _queries_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ministral3, "_get_llama_4_attn_scale", lambda size, *_: mx.ones((size, 1)))


MUTANTS = [
    (_queries_that_stay, "growing queries"),
    (_foreign_inputs, "own inputs and shared keys"),
    (_new_keys_alone, "own inputs and shared keys"),
    (_narrow_heads, "wide heads"),
    (_no_windows, "windows in turns"),
    (_no_windows, "windows everywhere"),
    (_no_windows, "windows beside fused matrices"),
    (_masks_of_rows_on_key_heads, "windows in turns"),
    (_rounded_ramp, "a ramp between dimensions"),
    (_long_factors, "short factors"),
    (_biases_as_stored, "groups of experts that lost"),
    (_no_sinks, "a ramp between dimensions"),
    (_stale_latents, "queries as they are"),
]


@pytest.mark.parametrize(("mutate", "what"), MUTANTS)
def test_mutants_fail_the_check(
    mutate: Callable[[pytest.MonkeyPatch], None],
    what: str,
    beyond: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, expected = beyond(what)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_like_transformers(mlx_pipeline(folder, (3,), context_tokens=128), expected)


def test_a_plan_beyond_the_short_factors_is_refused(beyond: Callable[..., Any]) -> None:
    folder, _ = beyond("short factors")
    with pytest.raises(ModelError, match="up to 128 tokens"):
        mlx_pipeline(folder, (3,), context_tokens=129)
