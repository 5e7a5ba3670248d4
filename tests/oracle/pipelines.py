"""Several engines chained in one process: what a pipeline computes, without its wires.

Everything goes through the Engine protocol and HostTensor boundaries, so any mixture of engines can be chained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count as count_from
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.steps import Boundary, Draw, Row, Sampling
from cluster.types import LayerRange, SequenceId
from node.engine import Engine, StageSpec, WorksAhead
from tests.oracle import ledger

Vector = npt.NDArray[np.float32]

Compute = Callable[[Sequence[Row], Boundary | None], object]
"""An engine's `step` or `begin`."""

GREEDY = Draw(sampling=Sampling(seed=0, temperature=0.0), prompt_tokens=0)
"""Asks a row for logits; these tests draw the largest one themselves."""

CONTEXT_TOKENS = 512


def stage_specs(
    folder: Path,
    cuts: Sequence[int],
    *,
    device: str = "cpu",
    kv_tokens: int = 8 * CONTEXT_TOKENS,
    context_tokens: int = CONTEXT_TOKENS,
    bits: int | None = None,
) -> list[StageSpec]:
    """One spec for each stage of the model in `folder`, cut before the layers in `cuts` (none is one stage)."""
    facts = read_facts(open_checkpoint(folder), bits)
    return [
        StageSpec(
            folder=folder,
            layers=LayerRange(first, last),
            layer_count=facts.layer_count,
            boundary=facts.boundary,
            device=device,
            threads=1,
            kv_tokens=kv_tokens,
            context_tokens=context_tokens,
            bits=facts.bits,
        )
        for first, last in pairwise((0, *cuts, facts.layer_count))
    ]


def load_pipeline(makers: Sequence[Callable[[], Engine]], specs: Sequence[StageSpec]) -> list[Engine]:
    """A loaded engine for each spec, made by the maker at the same place."""
    engines = []
    for make, spec in zip(makers, specs, strict=True):
        engine = make()
        engine.load(spec, lambda progress: None)
        ledger.loaded(engine, spec)
        engines.append(engine)
    return engines


def wrap_steps(engine: Engine, wrap: Callable[[Compute], Compute]) -> None:
    """Put something around the engine's steps, by whichever method a stage asks for them."""
    name = "begin" if isinstance(engine, WorksAhead) else "step"
    setattr(engine, name, wrap(getattr(engine, name)))


def run_step(engines: Sequence[Engine], rows: Sequence[Row]) -> npt.NDArray[np.float32]:
    """One ragged batch through every stage; returns the last one's logits."""
    ledger.ran(engines)
    inputs: Boundary | None = None
    for engine in engines[:-1]:
        output = engine.step(rows, inputs)
        assert isinstance(output, tuple), "a stage before the last answers a boundary"
        inputs = output
    logits = engines[-1].step(rows, inputs)
    assert isinstance(logits, np.ndarray), "the last stage answers logits"
    assert logits.dtype == np.float32
    return logits


def run_prefill(
    engines: Sequence[Engine], tokens: Sequence[int], cuts: Sequence[int] = (), *, seq: int = 1, start: int = 0
) -> Vector:
    """Feed `tokens` to a sequence at positions from `start`, in chunks cut at `cuts`; returns the last logits."""
    bounds = list(pairwise((0, *cuts, len(tokens))))
    for begin, end in bounds[:-1]:
        assert run_step(engines, [row(seq, start + begin, tokens[begin:end], draw=False)]).shape[0] == 0
    begin, end = bounds[-1]
    logits: Vector = run_step(engines, [row(seq, start + begin, tokens[begin:end])])[0]
    return logits


def greedy(
    engines: Sequence[Engine], prompt: Sequence[int], count: int, *, chunks: Sequence[int] = (), seq: int = 1
) -> tuple[list[int], npt.NDArray[np.float32]]:
    """Continue `prompt` by `count` tokens; returns them and the logits that each was drawn from."""
    logits = [run_prefill(engines, prompt, chunks, seq=seq)]
    ids = [int(logits[-1].argmax())]
    while len(ids) < count:
        logits.append(run_step(engines, [row(seq, len(prompt) + len(ids) - 1, ids[-1:])])[0])
        ids.append(int(logits[-1].argmax()))
    return ids, np.stack(logits)


def ragged(
    engines: Sequence[Engine],
    prompts: Sequence[Sequence[int]],
    count: int,
    pick: Callable[[Vector, list[int]], int] = lambda logits, tokens: int(logits.argmax()),
    *,
    chunk: int = 9,
    stagger: int = 2,
) -> list[tuple[list[int], npt.NDArray[np.float32]]]:
    """Continue several prompts by `count` tokens each in shared steps. A sequence arrives every `stagger` steps, so
    prefill chunks of some travel with decode rows of others. `pick` draws from logits and the tokens so far."""
    tokens = [list(prompt) for prompt in prompts]
    logits: list[list[Vector]] = [[] for _ in prompts]
    done = [0] * len(prompts)  # positions computed of each sequence
    for tick in count_from(0):
        open_seqs = [seq for seq in range(len(prompts)) if len(logits[seq]) < count and tick >= stagger * seq]
        if not open_seqs and tick >= stagger * len(prompts):
            break
        rows, drawing = [], []
        for seq in open_seqs:
            end = min(len(tokens[seq]), done[seq] + chunk)
            rows.append(row(seq, done[seq], tokens[seq][done[seq] : end], draw=end == len(tokens[seq])))
            done[seq] = end
            if end == len(tokens[seq]):
                drawing.append(seq)
        for seq, last in zip(drawing, run_step(engines, rows), strict=True):
            logits[seq].append(last)
            tokens[seq].append(pick(last, tokens[seq]))
    return [(tokens[seq][len(prompt) :], np.stack(logits[seq])) for seq, prompt in enumerate(prompts)]


def row(seq: int, start: int, tokens: Sequence[int], *, draw: bool = True) -> Row:
    return Row(seq=SequenceId(seq), start=start, tokens=tuple(tokens), draw=GREEDY if draw else None)


def close_pipeline(engines: Sequence[Engine]) -> None:
    for engine in engines:
        engine.close()
