"""The families beyond the first four on the torch engine: each equals the whole model, and without its own mechanism
it would not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import ModelFacts, read_facts
from cluster.steps import Boundary
from cluster.types import Backend, HostTensor
from node.engines.torch import attention, latent, shared
from node.engines.torch.inputs import InputMaker
from node.engines.torch.kv import SequenceCache
from node.engines.torch.slicing import SlicedModel
from tests.checkpoints import MORE_FAMILIES, STATE_FAMILIES, make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, ragged, row, run_prefill, run_step
from tests.oracle.reference import WholeModel, random_prompt
from tests.oracle.test_torch_engine import Checkpoints, References, assert_equal, torch_pipeline

ALL = (*MORE_FAMILIES, *STATE_FAMILIES)


@pytest.mark.parametrize("cuts", [(), (3,), (2, 4)])
@pytest.mark.parametrize("family", ALL)
def test_greedy_text_and_logits_equal_the_whole_model(
    family: str, cuts: tuple[int, ...], checkpoint: Checkpoints, reference: References
) -> None:
    expected = reference(family)
    engines = torch_pipeline(checkpoint(family), cuts)
    assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)


@pytest.mark.parametrize("family", ALL)
def test_prefill_cuts_give_the_same_logits(family: str, checkpoint: Checkpoints, reference: References) -> None:
    """Around the window of 16 that some have, one token at a time, and the rest."""
    expected = reference(family)
    engines = torch_pipeline(checkpoint(family), (2, 4))
    for seq, cuts in enumerate([(1,), (15,), (16,), (17, 33), (39,), range(1, 40)]):
        assert_equal(*greedy(engines, expected.prompt, 3, chunks=cuts, seq=seq), expected)


@pytest.mark.parametrize("family", ALL)
def test_rows_of_a_ragged_batch_do_not_see_each_other(
    family: str, checkpoint: Checkpoints, reference: References
) -> None:
    expected = [reference(family, prompt_tokens) for prompt_tokens in (5, 23, 40)]
    engines = torch_pipeline(checkpoint(family), (2, 4))
    found = ragged(engines, [answer.prompt for answer in expected], len(expected[0].ids))
    for (ids, logits), answer in zip(found, expected, strict=True):
        assert_equal(ids, logits, answer)


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_forked_and_trimmed_sequences_continue_like_fresh_ones(
    family: str, checkpoint: Checkpoints, whole_model: Callable[[str], WholeModel]
) -> None:
    prompt, other = random_prompt(30, seed=5), random_prompt(8, seed=6)
    engine = torch_pipeline(checkpoint(family))[0]
    run_prefill([engine], prompt)
    twin = row(2, 0, ()).seq
    assert engine.fork(row(1, 0, ()).seq, twin, 17) == 17
    assert engine.trim(row(1, 0, ()).seq, 9) == 9
    forked, trimmed = run_step([engine], [row(2, 17, other), row(1, 9, other)])
    for found, kept in ((forked, 17), (trimmed, 9)):
        expected = whole_model(family).logits(prompt[:kept] + other)[-1]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ALL)
def test_the_cache_and_the_weights_take_what_the_facts_say(family: str, checkpoint: Checkpoints) -> None:
    """With room for exactly the context, so that nothing is allocated ahead."""
    facts = read_facts(open_checkpoint(checkpoint(family)))
    assert Backend.TORCH in facts.backends
    bounds = (0, 2, 4, facts.layer_count)
    for engine, (first, last) in zip(
        torch_pipeline(checkpoint(family), bounds[1:-1], context_tokens=24), pairwise(bounds), strict=True
    ):
        owned = facts.layers[first:last]
        inputs = None if first == 0 else _zeros(facts, 24)
        engine.step([row(1, 0, random_prompt(24, seed=1), draw=False)], inputs)
        kept = sum(24 * layer.kv_bytes_per_token + layer.state_bytes for layer in owned)
        assert engine.capacity().kv_bytes == kept
        ends = (facts.embedding_bytes + facts.inputs_bytes) * (first == 0)
        ends += (facts.norm_bytes + facts.head_bytes) * (last == facts.layer_count)
        weights = sum(layer.resident_bytes[Backend.TORCH] for layer in owned) + ends
        assert engine.capacity().weight_bytes == weights


def _zeros(facts: ModelFacts, tokens: int) -> Boundary:
    return tuple(
        HostTensor(spec.dtype, (tokens, *spec.shape), bytes(spec.token_bytes * tokens)) for spec in facts.boundary
    )


@pytest.mark.parametrize("family", ALL)
def test_bfloat16_stages_round_like_the_whole_model(family: str, tmp_path: Path) -> None:
    """Scores and latents are multiplied in another order than the library's, so roundings differ, but by no more
    than rounding itself changes: what float32 makes of the same weights."""
    folder = make_checkpoint(family, tmp_path, dtype="bfloat16")
    prompt = random_prompt(40, seed=3)
    whole = WholeModel(folder).logits(prompt)[-1]
    rounding = np.abs(WholeModel(folder).in_float32().logits(prompt)[-1] - whole).mean()
    found = run_prefill(torch_pipeline(folder, (2, 4)), prompt, (13,))
    assert np.abs(found - whole).mean() < 1.5 * rounding


def _without(monkeypatch: pytest.MonkeyPatch, **lost: object) -> None:
    attend = attention._attend_sequence
    monkeypatch.setattr(attention, "_attend_sequence", lambda *args: attend(*args[:4], replace(args[4], **lost)))


def _faded_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks take part in what is the largest, and not in the sum."""
    attend = attention._attend_sequence

    def without_weight(*args: object) -> torch.Tensor:
        scoring = args[4]
        assert isinstance(scoring, attention.Scoring) and scoring.sinks is not None
        return attend(*args[:4], replace(scoring, sinks=scoring.sinks - 30.0))  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "_attend_sequence", without_weight)


def _unrotated_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    into = latent.into_latents
    monkeypatch.setattr(
        latent,
        "into_latents",
        lambda module, query, latents, rotated: into(module, query, latents, torch.zeros_like(rotated)),
    )


def _stale_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step's keys come too late: its position still holds those of the token before."""
    write = SequenceCache.write

    def late(
        self: SequenceCache, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        old = self._kept[layer]._keys
        return write(self, layer, start, old[:, 40:41] if start == 41 and old is not None else keys, values)

    monkeypatch.setattr(SequenceCache, "write", late)


def _late_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SlicedModel._arguments
    monkeypatch.setattr(
        SlicedModel,
        "_arguments",
        lambda self, source, positions, batch: arguments(self, source, positions + (positions > 40), batch),
    )


def _forgotten_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequenceCache, "state", lambda self, layer: None)


def _frozen_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step's states are lost, as if it had not been."""
    commit = SequenceCache.commit
    monkeypatch.setattr(
        SequenceCache,
        "commit",
        lambda self, length, states: commit(self, length, self._states if length == 42 else states),
    )


def _foreign_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer has the input of the one before it."""
    owned = InputMaker.owned
    monkeypatch.setattr(InputMaker, "owned", lambda self, inputs: owned(self, inputs.roll(1, dims=2)))


def _new_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers without keys of their own look at the newest of those that they share, and at no others."""
    borrow = shared.borrow

    def newest(module: torch.nn.Module, offered: dict[str, shared.Cached]) -> shared.Cached:
        keys, values, first = borrow(module, offered)
        return torch.where(_is_newest(keys), keys, 0.0), torch.where(_is_newest(keys), values, 0.0), first

    monkeypatch.setattr(shared, "borrow", newest)


def _is_newest(keys: torch.Tensor) -> torch.Tensor:
    return (torch.arange(keys.shape[1]) == keys.shape[1] - 1)[:, None]


MUTANTS = [
    *((name, mutate) for name in ALL for mutate in (_stale_kv, _late_positions)),
    *((name, mutate) for name in STATE_FAMILIES for mutate in (_forgotten_states, _frozen_states)),
    *((name, partial(_without, window=None)) for name in ("olmo3", "gemma2", "gpt_oss", "gemma4", "gemma4_small")),
    ("gemma4_small", _foreign_inputs),
    ("gemma4_small", _new_keys_alone),
    ("gemma2", partial(_without, softcap=None)),
    ("gpt_oss", partial(_without, sinks=None)),
    ("gpt_oss", _faded_sinks),
    ("gemma4", partial(_without, scaling=None)),
    ("deepseek_v3", _unrotated_latents),
    ("deepseek_v3", partial(_without, scaling=None)),
]


@pytest.mark.parametrize(("family", "mutate"), MUTANTS)
def test_mutants_fail_the_check(
    family: str,
    mutate: Callable[[pytest.MonkeyPatch], None],
    checkpoint: Checkpoints,
    reference: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = reference(family)
    engines = torch_pipeline(checkpoint(family), (3,))
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_equal(*greedy(engines, expected.prompt, 8), expected)
