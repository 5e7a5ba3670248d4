"""What 16 bits may round away: transformers in 16 bits beside transformers in float32, with the same weights.

A greedy text and a tolerance tell little there: rounding moves logits by a thirtieth of their width, and by up to a
third where it makes a router choose other experts. So each layer is given what the whole model has there in 16 bits,
and its answer is compared with what float32 makes of the same input. How far the library itself is from that says how
far an engine may be. Owns that judge. Knows engines as things that step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.steps import Boundary
from node.comparison import from_host, to_host
from node.engine import Engine
from tests.oracle.pipelines import load_pipeline, row, run_prefill, run_step, stage_specs
from tests.oracle.reference import LAST_TOKENS, random_prompt, top_two_gaps

Floats = npt.NDArray[np.float32]

PROMPT_TOKENS = 40
CHUNK = 17  # of the prompt, which arrives in two
GAP_ROUNDINGS = 8
SEEDS = range(1, 17)


@dataclass(frozen=True, slots=True)
class Judge:
    """One text, and what transformers computes on it."""

    tokens: tuple[int, ...]  # a prompt, and what float32 says greedily
    cuts: tuple[int, ...]  # before each smallest part that can be cut out, and after the last
    hidden: tuple[Floats, ...]  # [tokens, hidden size]: what enters each part in 16 bits
    rounded: tuple[Floats, ...]  # what leaves it in 16 bits; the last one's are logits
    exact: tuple[Floats, ...]  # what leaves it in float32, given the same
    logits: Floats  # [tokens, vocabulary] of the whole model in float32
    logits_rounded: Floats  # in 16 bits

    def errors(self, found: Sequence[Floats]) -> list[float]:
        """How far each part is from float32, where the library in 16 bits is 1 away."""
        return [
            max(_middle(one[at], exact[at]) / _middle(rounded[at], exact[at]) for at in _pieces_compared(len(exact)))
            for exact, rounded, one in zip(self.exact, self.rounded, found, strict=True)
        ]

    def error_of_logits(self, found: Floats) -> float:
        """The same for the whole pipeline."""
        return _middle(found, self.logits) / _middle(self.logits_rounded, self.logits)

    def distance(self, found: Floats) -> float:
        """The same in terms of the width of logits."""
        return _middle(found, self.logits) / float((self.logits - self.logits.mean(axis=-1, keepdims=True)).std())

    @property
    def decisive(self) -> npt.NDArray[np.bool_]:
        """Where the likeliest token wins by far more than rounding could change."""
        return np.array(top_two_gaps(self.logits)) > GAP_ROUNDINGS * _middle(self.logits_rounded, self.logits)


def _pieces_compared(tokens: int) -> tuple[slice, ...]:
    """What came in chunks, and what came alone; logits are drawn of the latter."""
    return (slice(PROMPT_TOKENS), slice(PROMPT_TOKENS, None)) if tokens > PROMPT_TOKENS else (slice(None),)


def _middle(found: Floats, expected: Floats) -> float:
    """The median token's distance. A router that holds two experts about level sends some tokens elsewhere."""
    return float(np.median(np.sqrt(np.mean(np.square(found - expected), axis=-1))))


@torch.inference_mode()
def judge_of(folder: Path, unpacked: Path, dtype: torch.dtype, *, decisive_min: int) -> Judge:
    """Of the model in `folder`, whose numbers are in `unpacked` as transformers stores them; on the first text with so
    many decisive tokens."""
    facts = read_facts(open_checkpoint(folder))
    cuts = tuple(sorted(facts.legal_cuts | {0, facts.layer_count}))
    exact, rounded = (_load(unpacked, kind) for kind in (torch.float32, dtype))
    for seed in SEEDS:
        prompt = torch.tensor([random_prompt(PROMPT_TOKENS, seed)])
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        said = exact.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=LAST_TOKENS, **settings)
        tokens = tuple(said[0].tolist())
        entering, leaving = _trace(rounded, tokens, cuts)
        _, exactly = _trace(exact, tokens, cuts, entering)
        _, alone = _trace(exact, tokens, cuts)
        found = Judge(tokens, cuts, entering, leaving, exactly, alone[-1], leaving[-1])
        if found.decisive.sum() >= decisive_min:
            return found
    raise AssertionError(f"no text with a seed in {SEEDS} has {decisive_min} decisive tokens")


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def _trace(
    model: Any, tokens: Sequence[int], cuts: Sequence[int], given: Sequence[Floats] | None = None
) -> tuple[tuple[Floats, ...], tuple[Floats, ...]]:
    """What enters and leaves each part in one forward; each part but the first is given what is `given`."""
    decoder = model.get_decoder()
    layers = list(getattr(decoder, "model", decoder).layers)
    entering: list[Floats] = []
    leaving: list[Floats] = []

    def on_enter(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        part = len(entering)
        entering.append(_floats(args[0]))
        if part > 0 and given is not None:
            args = (torch.from_numpy(given[part])[None].to(args[0].dtype), *args[1:])
        return args, kwargs

    def on_leave(_: object, __: object, output: Any) -> None:
        leaving.append(_floats(output if isinstance(output, torch.Tensor) else output[0]))

    hooks = [layers[first].register_forward_pre_hook(on_enter, with_kwargs=True) for first in cuts[:-1]]
    hooks += [layers[last - 1].register_forward_hook(on_leave) for last in cuts[1:-1]]
    logits = _floats(model(torch.tensor([list(tokens)]), use_cache=False).logits)[PROMPT_TOKENS - 1 :]
    for hook in hooks:
        hook.remove()
    return tuple(entering), (*leaving, logits)


def _floats(tensor: torch.Tensor) -> Floats:
    return np.array(tensor[0].float().numpy())


def parts_alone(folder: Path, maker: Callable[[], Engine], judge: Judge, *, bits: int | None = None) -> list[Floats]:
    """What each part makes of what enters it, on an engine of its own; of the last one logits."""
    specs = stage_specs(folder, judge.cuts[1:-1], bits=bits)
    found = []
    others: list[Boundary] = []  # what layers have for themselves, which comes from the first stage
    for spec, entering in zip(specs, judge.hidden, strict=True):
        (engine,) = load_pipeline([maker], [spec])
        outputs: list[Any] = []
        for index, (begin, end) in enumerate(_pieces(len(judge.tokens))):
            own = (to_host(entering[begin:end], spec.boundary[0].dtype),)
            inputs = None if spec.layers.first == 0 else (*own, *others[index])
            outputs.append(engine.step([row(1, begin, judge.tokens[begin:end], draw=end >= PROMPT_TOKENS)], inputs))
        engine.close()
        if isinstance(outputs[0], tuple):
            others = others or [output[1:] for output in outputs]
            found.append(np.concatenate([from_host(output[0]) for output in outputs]))
        else:
            found.append(np.concatenate(outputs))
    return found


def _pieces(tokens: int) -> list[tuple[int, int]]:
    return list(pairwise((0, CHUNK, *range(PROMPT_TOKENS, tokens + 1))))


def follow(engines: Sequence[Engine], judge: Judge) -> Floats:
    """The logits of a pipeline that is told the text, token by token."""
    logits = [run_prefill(engines, judge.tokens[:PROMPT_TOKENS], (CHUNK,))]
    for place in range(PROMPT_TOKENS, len(judge.tokens)):
        logits.append(run_step(engines, [row(1, place, judge.tokens[place : place + 1])])[0])
    return np.stack(logits)
