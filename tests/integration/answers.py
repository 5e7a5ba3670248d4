"""What a cluster must answer: continuations by the whole model in one process, greedy and sampled.

A reference counts only if rounding could not change it: every token must win although all others get a head start
of twice the tolerance.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.steps import Draw, Sampling
from node.sampling import draw
from tests.checkpoints import END, make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.reference import DISTINCT_MIN, WholeModel, random_prompt

COUNT = 48
"""Tokens of each reference."""

ENDS_AT = 12
"""Where the answer to a Served model's question draws an end of sequence."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, how its continuation is drawn, and the tokens that come out of a single process."""

    prompt: tuple[int, ...]
    sampling: Sampling
    ids: tuple[int, ...]

    def fields(self) -> dict[str, object]:
        """The request's fields, as a client writes them."""
        how = self.sampling
        return {
            "max_tokens": len(self.ids),
            "seed": how.seed,
            "temperature": how.temperature,
            "top_k": how.top_k,
            "top_p": how.top_p,
            "min_p": how.min_p,
            "presence_penalty": how.presence_penalty,
            "frequency_penalty": how.frequency_penalty,
            "repetition_penalty": how.repetition_penalty,
        }


GREEDY = Sampling(seed=0, temperature=0.0)
SAMPLINGS = (
    GREEDY,
    Sampling(seed=0, temperature=1.0),
    Sampling(seed=0, temperature=0.8, top_k=40),
    Sampling(seed=0, temperature=1.3, top_p=0.9),
    Sampling(seed=0, temperature=1.0, min_p=0.02),
    Sampling(seed=0, temperature=0.9, presence_penalty=0.5, frequency_penalty=0.3),
    Sampling(seed=0, temperature=1.0, repetition_penalty=1.2),
    GREEDY,
)
LENGTHS = (40, 7, 23, 64, 3, 130, 18, 90)
"""Of the prompts: all different, so that batches are ragged and prefills meet decodes."""


def questions(model: WholeModel, count: int = COUNT) -> list[Question]:
    """Eight that differ in everything, each decisive."""
    return [question(model, length, how, count) for length, how in zip(LENGTHS, SAMPLINGS, strict=True)]


def question(model: WholeModel, length: int, sampling: Sampling, count: int = COUNT) -> Question:
    """The first prompt (greedy) or seed (sampled) whose continuation is decisive and varied."""
    for seed in range(100):
        prompt = random_prompt(length, seed)
        how = sampling if sampling.temperature == 0 else replace(sampling, seed=seed)
        ids = list(itertools.islice(_continuation(model, prompt, how), count))
        if len(ids) == count and len(set(ids)) >= DISTINCT_MIN:
            return Question(tuple(prompt), how, tuple(ids))
    raise AssertionError(f"no prompt of {length} tokens gives a decisive continuation with {sampling}")


def continue_greedily(model: WholeModel, prompt: list[int], count: int) -> list[int] | None:
    """The greedy continuation, or None where it is not decisive."""
    ids = list(itertools.islice(_continuation(model, prompt, GREEDY), count))
    return ids if len(ids) == count else None


def _continuation(model: WholeModel, prompt: list[int], sampling: Sampling) -> Iterator[int]:
    """Token after token, until one is not decisive."""
    tokens = list(prompt)
    how = Draw(sampling, len(prompt))
    while True:
        logits = model.logits(tokens)[-1]
        token = draw(logits, how, tokens)
        handicapped = logits + np.float32(TOLERANCE)
        handicapped[token] -= 2 * np.float32(TOLERANCE)
        if draw(handicapped, how, tokens) != token:
            return
        tokens.append(token)
        yield token


@dataclass(frozen=True, slots=True)
class Served:
    """A model for whole tests of the endpoint. Its greedy answer to `asked` draws `end` as token number ENDS_AT, and
    that id is an end of sequence."""

    folder: Path
    whole: WholeModel
    tokenizer: Any  # transformers' own
    asked: Question
    end: int

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def chat_ids(self, content: str) -> list[int]:
        messages = [{"role": "user", "content": content}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def make_served(folder: Path) -> Served:
    """Make such a model in `folder`."""
    from transformers import AutoTokenizer

    whole = WholeModel(make_checkpoint("qwen3", folder))
    candidates = (question(whole, length, GREEDY) for length in range(20, 60))
    asked = next(each for each in candidates if each.ids.index(each.ids[ENDS_AT]) == ENDS_AT)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [END, asked.ids[ENDS_AT]]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return Served(folder, whole, AutoTokenizer.from_pretrained(folder), asked, asked.ids[ENDS_AT])
