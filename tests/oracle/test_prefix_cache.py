"""Prompts that begin alike, over HTTP and on real engines: answers stay what the whole model says, and stages compute
no more than what `usage` leaves over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.placement import stage_cost
from cluster.placement.costs import KV_AHEAD
from cluster.rewinding import EXACT
from cluster.types import LayerRange
from coordinator.builtin import demo_model_path
from coordinator.text.model import load_text_model
from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from tests.oracle.conftest import TOLERANCE
from tests.oracle.reference import WholeModel, random_prompt
from tests.oracle.served import CONTEXT, Endpoint, endpoint

Makers = Sequence[Callable[[], Engine]]
Checkpoints = Callable[[str], Path]
WholeModels = Callable[[str], WholeModel]

MAKERS = [
    pytest.param((TorchEngine,), id="torch"),
    pytest.param((MlxEngine,), id="mlx"),
    pytest.param((TorchEngine, MlxEngine), id="torch-mlx"),
]
SPECIAL = ["llama", "gemma3", "gpt_oss", "deepseek_v3", "gemma4_small", "llama4", "qwen3_next", "lfm2"]
"""Everything kept; windows; windows and sinks; latents; shared keys; chunks; two kinds of states."""

COUNT = 8
PROMPT = random_prompt(300, seed=5)


def run(makers: Makers, folder: Path, talk: Callable[[Endpoint], Awaitable[None]], **options: Any) -> None:
    async def work() -> None:
        async with endpoint(makers, folder, **options) as it:
            await talk(it)

    asyncio.run(work())


def ids_of(answer: Any, choice: int = 0) -> list[int]:
    return list(answer["choices"][choice]["token_ids"])


def cached_of(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def assert_greedy(model: WholeModel, prompt: Sequence[int], ids: Sequence[int]) -> None:
    """Each token is the whole model's, or as good as that within the tolerance."""
    logits = model.logits([*prompt, *ids])[len(prompt) - 1 : -1]
    lost = logits.max(axis=1) - np.take_along_axis(logits, np.array(ids)[:, None], axis=1)[:, 0]
    assert lost.max() <= 2 * TOLERANCE


async def assert_answer(it: Endpoint, model: WholeModel, prompt: list[int], cached: int) -> list[int]:
    """The answer is the whole model's; the stages had so much of the prompt, and computed only the rest."""
    before = it.pipeline.tokens_computed
    answer = await it.complete(prompt, COUNT)
    assert cached_of(answer) == cached
    # The last token that is drawn is not computed any more.
    assert it.pipeline.tokens_computed - before == len(prompt) - cached + COUNT - 1
    assert_greedy(model, prompt, ids_of(answer))
    return [*prompt, *ids_of(answer)]


@pytest.mark.parametrize("makers", MAKERS)
@pytest.mark.parametrize("family", SPECIAL)
def test_the_second_turn_does_not_compute_its_history_again(
    family: str, makers: Makers, checkpoint: Checkpoints, whole_model: WholeModels
) -> None:
    """Nor does another second turn, nor a third: each begins where an earlier one ended."""
    model = whole_model(family)
    # The second turn has computed the first answer's last token; a state goes back to where the first turn ended.
    not_there = 0 if read_facts(open_checkpoint(checkpoint(family))).rewind.every is None else 1

    async def talk(it: Endpoint) -> None:
        one = await assert_answer(it, model, PROMPT, 0)
        two = await assert_answer(it, model, [*one, *random_prompt(20, seed=1)], len(one) - 1)
        await assert_answer(it, model, [*one, *random_prompt(20, seed=2)], len(one) - not_there)
        await assert_answer(it, model, [*two, *random_prompt(20, seed=3)], len(two) - 1)
        held = it.serving.prefixes.retained_tokens
        assert it.pipeline.tokens_held == [held] * len(makers)

    run(makers, checkpoint(family), talk)


@pytest.mark.parametrize("makers", MAKERS)
def test_a_chat_goes_on_from_the_tokens_that_were_drawn(makers: Makers) -> None:
    """Hot enough that the built-in model draws tokens into which nobody would cut its words."""
    tokenizer = load_text_model(demo_model_path()).tokenizer
    question = "What can you tell me about all of these machines here on my desk?"

    async def talk(it: Endpoint) -> None:
        for seed in range(20):
            answer = await it.chat(question, max_tokens=24, temperature=1.5, seed=seed)
            (choice,), ids = answer["choices"], ids_of(answer)
            said, is_whole = choice["message"]["content"], choice["finish_reason"] == "length"
            is_text = "\ufffd" not in said and not any(map(tokenizer.is_silent, ids))
            if is_whole and is_text and tuple(ids) != tokenizer.encode(said, add_special_tokens=False):
                break
        else:
            pytest.fail("every answer was cut as its text would be")
        turn = [*answer["prompt_token_ids"], *ids]
        before = it.pipeline.tokens_computed
        second = await it.chat(question, said, "And then?", max_tokens=1)
        assert second["prompt_token_ids"][: len(turn)] == turn
        assert cached_of(second) == len(turn) - 1
        assert it.pipeline.tokens_computed - before == second["usage"]["prompt_tokens"] - cached_of(second)

    run(makers, demo_model_path(), talk)


@pytest.mark.parametrize("makers", MAKERS)
@pytest.mark.parametrize("family", SPECIAL)
def test_choices_of_a_prompt_compute_it_once(family: str, makers: Makers, checkpoint: Checkpoints) -> None:
    """They draw what they draw without sharing anything. Nothing of the prompt had been there before."""
    told: list[Any] = []
    computed: list[int] = []

    async def talk(it: Endpoint) -> None:
        told.append(await it.complete(PROMPT, COUNT, n=3, seed=7, temperature=2))
        computed.append(it.pipeline.tokens_computed)

    for prefix_cache in (True, False):
        run(makers, checkpoint(family), talk, prefix_cache=prefix_cache)
    shared, alone = told
    assert [ids_of(shared, choice) for choice in range(3)] == [ids_of(alone, choice) for choice in range(3)]
    assert len({tuple(ids_of(shared, choice)) for choice in range(3)}) == 3
    assert cached_of(shared) == cached_of(alone) == 0
    # Each choice computes at least the last token of the prompt, to draw from it.
    assert computed == [len(PROMPT) + 2 + 3 * (COUNT - 1), 3 * (len(PROMPT) + COUNT - 1)]


@pytest.mark.parametrize("makers", MAKERS)
def test_of_two_that_come_at_once_one_computes_what_both_begin_with(
    makers: Makers, checkpoint: Checkpoints, whole_model: WholeModels
) -> None:
    prompts = [[*PROMPT, *random_prompt(length, seed=length)] for length in (30, 10)]

    async def talk(it: Endpoint) -> None:
        answers = await asyncio.gather(*(it.complete(prompt, COUNT) for prompt in prompts))
        assert [cached_of(answer) for answer in answers] == [0, len(PROMPT)]
        assert it.pipeline.tokens_computed == len(PROMPT) + 30 + 10 + 2 * (COUNT - 1)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_greedy(whole_model("llama"), prompt, ids_of(answer))

    run(makers, checkpoint("llama"), talk)


def test_another_key_finds_nothing(checkpoint: Checkpoints) -> None:
    async def talk(it: Endpoint) -> None:
        for key, cached in (("", 0), ("ada", 0), ("bob", 0), ("ada", 299), ("", 299)):
            assert cached_of(await it.complete(PROMPT, 1, key=key)) == cached, key

    run((TorchEngine,), checkpoint("llama"), talk)


def test_switched_off_nothing_is_kept(checkpoint: Checkpoints) -> None:
    async def talk(it: Endpoint) -> None:
        assert [cached_of(await it.complete(PROMPT, 1)) for _ in range(2)] == [0, 0]
        assert it.serving.prefixes.retained_sequences == 0
        await it.pipeline.idle.wait()
        assert it.pipeline.tokens_held == [0]

    run((TorchEngine,), checkpoint("llama"), talk, prefix_cache=False)


@pytest.mark.parametrize("makers", MAKERS[:2])
@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_what_is_kept_never_takes_more_than_was_promised(family: str, makers: Makers, checkpoint: Checkpoints) -> None:
    """Fourteen conversations of up to the whole context, four at a time, in room for two full ones: whatever is kept
    makes way, everybody is answered, and engines hold what the plan says at most."""
    facts = read_facts(open_checkpoint(checkpoint(family)))
    users = 2

    async def converse(it: Endpoint, seed: int) -> None:
        history = random_prompt(40 + 15 * seed, seed=seed)
        for turn in range(3):
            answer = await it.complete(history, COUNT)
            history = [*history, *ids_of(answer), *random_prompt(60, seed=turn)]
            assert cached_of(answer) < len(history)

    async def talk(it: Endpoint) -> None:
        turns = asyncio.Semaphore(4)

        async def in_turn(seed: int) -> None:
            async with turns:
                await converse(it, seed)

        await asyncio.gather(*(in_turn(seed) for seed in range(14)))
        (backend,) = {stage.backend for stage in it.pipeline.engines}
        cost = stage_cost(facts, LayerRange(0, facts.layer_count), backend, context=CONTEXT, users=users, on_cpu=True)
        assert it.serving.prefixes.retained_tokens > users * CONTEXT // 2 or facts.rewind != EXACT
        assert it.serving.prefixes.cached_tokens > 0
        assert max(it.pipeline.kv_bytes) <= cost.kv_bytes + cost.kv_bytes // KV_AHEAD

    run(makers, checkpoint(family), talk, users=users)
