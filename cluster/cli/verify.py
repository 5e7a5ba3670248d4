"""`potluck verify`: does every stage and every layer compute what the library computes with the whole model?

Owns: what the options mean, how the model is cut, and the choice of the reference. The comparing is
`node.verification`, the showing `cluster.cli.verify_report`. Everything runs in this process: no node is asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import assert_never

import numpy as np
from rich.console import Console

from cluster.cli.verify_report import Report, Telling, document, show
from cluster.errors import DoesNotFit, UsageError
from cluster.models.checkpoint import Checkpoint, open_checkpoint
from cluster.models.facts import ModelFacts, read_facts
from cluster.models.families import family_of
from cluster.placement import stage_cost
from cluster.quantities import format_bytes
from cluster.types import Backend, DType, LayerRange
from coordinator.hub import resolve_model
from node.comparison import Trace
from node.engines.registry import create_engine
from node.hardware import Device, detect_devices, engine_version, measure_memory, read_machine
from node.verification import SEQUENCES, Part, Subject, verify


@dataclass(frozen=True, slots=True)
class VerifyCommand:
    """The options as typed."""

    model: str
    stages: int
    backend: str
    tokens: int
    as_json: bool


def verify_command(command: VerifyCommand) -> int:
    backends = parse_backends(command.backend, command.stages)
    with Telling() as tell:
        model = resolve_model(
            command.model, progress=lambda done, total: tell(f"downloading {command.model}", done, total)
        )
        checkpoint = open_checkpoint(model.folder)
        subject = _subject(checkpoint, command, backends)
        reference = _reference(subject.facts)
        check_memory(subject, reference, command.tokens)
        tell(f"the whole model by {engine_version(reference.backend)} on {reference.device}", 0, 0)
        trace = _trace(subject, _input(subject.facts, command.tokens), reference)
        verdict = verify(subject, trace, create_engine, tell)
    notes = _notes(checkpoint, subject, command.tokens)
    report = Report(model.name, model.revision, subject.facts, command.tokens, reference, verdict, notes)
    if command.as_json:
        sys.stdout.write(json.dumps(document(report), allow_nan=False) + "\n")
    else:
        show(report, Console(highlight=False))
    return 0 if verdict.within else 1


def parse_backends(text: str, stages: int) -> tuple[Backend, ...]:
    """The engine of each stage, the names repeated in order; empty for `auto`."""
    if text.strip() == "auto":
        return ()
    names = [name.strip() for name in text.split(",")]
    known = {backend.value for backend in Backend}
    if not set(names) <= known:
        raise UsageError(f"expected --backend auto, or names from {', '.join(sorted(known))}, found {text!r}")
    if len(names) > stages:
        raise UsageError(f"--backend {text} names {len(names)} engines for --stages {stages}")
    return tuple(Backend(names[stage % len(names)]) for stage in range(stages))


def even_cut(facts: ModelFacts, stages: int) -> tuple[LayerRange, ...]:
    """Stages of about as many layers each, cut only where the model can be."""
    cuts = sorted(facts.legal_cuts | {0})
    if stages > len(cuts):
        raise UsageError(f"--stages {stages} is more than this model can be cut into: it has {len(cuts)} layers")
    begins = [cuts[stage * len(cuts) // stages] for stage in range(stages)]
    return tuple(LayerRange(first, last) for first, last in pairwise((*begins, facts.layer_count)))


def _subject(checkpoint: Checkpoint, command: VerifyCommand, backends: Sequence[Backend]) -> Subject:
    facts = read_facts(checkpoint)
    if command.tokens > facts.context_tokens:
        raise UsageError(f"--tokens {command.tokens} is beyond the model's context of {facts.context_tokens}")
    cuts = even_cut(facts, command.stages)
    if missing := set(backends) - facts.backends:
        able = ", ".join(sorted(facts.backends))
        raise UsageError(f"--backend {command.backend}: this model runs on {able} alone, not on {min(missing)}")
    devices = [detect_devices(backend)[0] for backend in backends] or [_best_device(facts)] * len(cuts)
    parts = tuple(Part(stage, layers, devices[stage]) for stage, layers in enumerate(cuts))
    return Subject(checkpoint.folder, facts, parts)


def _best_device(facts: ModelFacts) -> Device:
    """What `join` would choose, if the model runs on it."""
    best = detect_devices()[0]
    return best if best.backend in facts.backends else detect_devices(min(facts.backends))[0]


def _reference(facts: ModelFacts) -> Device:
    """transformers on the processor, whose arithmetic no driver and no fast kernel changes; where it is not
    installed or cannot read the checkpoint, mlx-lm where MLX runs best."""
    if Backend.TORCH in facts.backends & read_machine().engines:
        return detect_devices(Backend.TORCH, "cpu")[0]
    return detect_devices(Backend.MLX)[0]


def check_memory(subject: Subject, reference: Device, tokens: int) -> None:
    """Refuse now what would otherwise end in swapping, or in a process that the system kills."""
    facts = subject.facts
    needs = [(facts.stored_bytes, reference, "the reference holds the whole model", "use a machine with more memory")]
    for part in subject.stages:
        cost = stage_cost(facts, part.layers, part.device.backend, context=tokens, users=SEQUENCES)
        needs.append(
            (cost.memory_bytes, part.device, f"stage {part.stage} holds layers {part.layers}", "more --stages")
        )
    for needed_bytes, device, what, remedy in needs:
        memory = measure_memory(device)
        if needed_bytes > memory.budget_bytes:
            raise DoesNotFit(
                f"{what} and needs {format_bytes(needed_bytes)}; {device.device} may use "
                f"{format_bytes(memory.budget_bytes)} ({memory.explained}). What helps: {remedy}"
            )


def _input(facts: ModelFacts, tokens: int) -> tuple[int, ...]:
    """Any ids will do, as long as they are the same each time."""
    return tuple(int(token) for token in np.random.default_rng(0).integers(0, facts.vocab_size, size=tokens))


def _trace(subject: Subject, tokens: tuple[int, ...], reference: Device) -> Trace:
    match reference.backend:
        case Backend.TORCH:
            from node.engines.torch import reference as torch_reference

            return torch_reference.trace_whole_model(subject.folder, subject.facts, tokens, reference)
        case Backend.MLX:
            from node.engines.mlx import reference as mlx_reference

            return mlx_reference.trace_whole_model(subject.folder, subject.facts, tokens, reference)
        case _:
            assert_never(reference.backend)


def _notes(checkpoint: Checkpoint, subject: Subject, tokens: int) -> tuple[str, ...]:
    """What this run could not see."""
    notes = []
    family, config = family_of(checkpoint.config, str(checkpoint.folder))
    window = config.get("sliding_window")
    if family.has_windows and isinstance(window, int) and tokens <= window:
        notes.append(f"{tokens} tokens lie within the sliding window of {window}; --tokens {window * 3 // 2} passes it")
    if subject.routed and subject.facts.dtype is not DType.F32:
        notes.append("errors are the median token's: in 16 bits a router may choose another expert for a few tokens")
    return tuple(notes)
