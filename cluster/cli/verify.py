"""`potluck verify`: does every stage and every layer compute what the library computes with the whole model?

Owns: what the options mean, and the choice of devices and of the reference. How the model is cut is
`cluster.cli.verify_cut`, the comparing `node.verification` and, with earlier days, `cluster.cli.drift`; the showing is
`cluster.cli.verify_report`. Everything runs in this process: no node is asked, even where a cluster's plan is verified.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final, assert_never

import numpy as np
from rich.console import Console

from cluster.cli import drift
from cluster.cli.endpoint import Endpoint
from cluster.cli.fingerprints import Fingerprints
from cluster.cli.verify_cut import Cut, RunningPlan, check_cuts, even_cut, parse_backends, parse_stages, read_plan
from cluster.cli.verify_notes import notes_on_input, notes_on_plan, notes_on_reference, notes_on_store
from cluster.cli.verify_report import Report, Telling, document, show
from cluster.errors import DoesNotFit, UsageError
from cluster.models.checkpoint import Checkpoint, open_checkpoint
from cluster.models.facts import ModelFacts, read_facts
from cluster.models.formats import MLX_MODES
from cluster.models.layout import Unused, part_of
from cluster.models.manifest import build_manifest
from cluster.models.matrices import read_matrices
from cluster.models.quantising import check_bits
from cluster.placement import stage_cost
from cluster.quantities import format_bytes
from cluster.state_dir import StateDir, default_state_path
from cluster.types import CPU, Backend, ModelId
from coordinator.hub import ResolvedModel, resolve_model, work_on
from coordinator.server import conversions_folder
from node.comparison import Trace
from node.engines.registry import create_engine
from node.hardware import Device, detect_devices, engine_version, measure_memory, read_machine
from node.verdict import Part
from node.verification import SEQUENCES, Subject, verify


@dataclass(frozen=True, slots=True)
class VerifyCommand:
    """The options as typed."""

    model: str | None
    stages: str | None = None
    backend: str = "auto"
    tokens: int = 48
    bits: int | None = None
    wire_bits: str | None = None
    url: str | None = None
    accept: bool = False
    state: Path | None = None
    as_json: bool = False


DRIFTED: Final = 3
"""The exit code when everything is right and some layer has moved: a gate may want to know both apart."""


def verify_command(command: VerifyCommand) -> int:
    if command.wire_bits not in (None, "8"):
        raise UsageError(f"expected --wire-bits 8, found {command.wire_bits!r}")
    running = _running_plan(command)
    text, revision = _wanted_model(command.model, running)
    cuts = _wanted_cuts(command, running)
    bits = running.bits if running else check_bits(command.bits)
    with Telling() as tell, StateDir((command.state or default_state_path()) / "verify") as state:
        model = _resolve(text, revision, command.state, tell)
        checkpoint = open_checkpoint(model.folder)
        subject = _subject(checkpoint, command, cuts, bits)
        reference = _reference(checkpoint, subject.facts)
        check_memory(subject, whole_bytes(checkpoint, subject.facts, reference.backend), reference, command.tokens)
        # The coordinator remembers hashes there, and so they need not be computed again.
        manifest = build_manifest(
            checkpoint,
            name=model.name,
            revision=model.revision,
            cache=state.path.parent / "coordinator" / "hashes",
            progress=lambda done, total: tell("hashing the model", done, total),
        )
        tell(f"the whole model by {engine_version(reference.backend)} on {reference.device}", 0, 0)
        trace = _trace(subject, _input(subject.facts, command.tokens), reference)
        verdict = verify(subject, trace, create_engine, tell)
        store = Fingerprints(state.path / "fingerprints")
        model_id = packed_id(manifest.id, subject.facts)
        drifts = drift.compare(subject, verdict, model_id, command.tokens, store)
        has_drifted = any(found.beyond for found in drifts)
        keeps = verdict.within and (command.accept or not has_drifted)  # what is wrong is nothing to compare with
        if keeps:
            drift.keep(subject, verdict, model_id, command.tokens, store, accept=command.accept)
    notes = (
        *notes_on_input(checkpoint, subject, command.tokens),
        *notes_on_reference(checkpoint, subject, reference, command.tokens),
        *notes_on_plan(subject, running),
        *notes_on_store(store),
    )
    report = Report(model.name, model.revision, subject.facts, command.tokens, reference, verdict, drifts, keeps, notes)
    if command.as_json:
        sys.stdout.write(json.dumps(document(report), allow_nan=False) + "\n")
    else:
        show(report, Console(highlight=False))
    if not verdict.within:
        return 1
    return DRIFTED if has_drifted and not command.accept else 0


def packed_id(model: ModelId, facts: ModelFacts) -> ModelId:
    """What fingerprints know the model by: packed at load, it computes something else."""
    return ModelId(f"{model}, {facts.bits} bits") if facts.bits is not None else model


def _running_plan(command: VerifyCommand) -> RunningPlan | None:
    if command.url is None:
        return None
    if command.stages is not None or command.backend != "auto" or command.bits is not None:
        raise UsageError("--url takes these from the running plan; leave --stages, --backend and --bits out")
    return read_plan(Endpoint(command.url).get("/potluck/status"))


def _wanted_model(named: str | None, running: RunningPlan | None) -> tuple[str, str | None]:
    """MODEL and its revision: what is named, else what the cluster serves, as far as this machine can have it."""
    if running is None:
        if named is None:
            raise UsageError("expected MODEL, or --url with the endpoint whose plan is to be verified")
        return named, None
    if named is not None:
        return named, running.revision if named == running.source else None
    if running.revision is None and running.source != "demo" and not _is_here(running.source):
        raise UsageError(
            f"the cluster serves {running.source}, and this machine has nothing there; "
            "name MODEL as well: its folder on this machine"
        )
    return running.source, running.revision


def _resolve(text: str, revision: str | None, state: Path | None, tell: Telling) -> ResolvedModel:
    model = resolve_model(
        text,
        conversions=conversions_folder(state),
        revision=revision,
        progress=lambda done, total: tell(work_on(text), done, total),
    )
    if revision is not None and model.commit != revision:  # a folder here may have the name of a model on the hub
        raise UsageError(
            f"the cluster serves commit {revision} of {text}, which means {model.folder} here; start in another folder"
        )
    return model


def _is_here(source: str) -> bool:
    path = Path(source)
    try:
        return path.is_absolute() and path.exists()
    except OSError:  # another user's folder, or no path at all
        return False


def _wanted_cuts(command: VerifyCommand, running: RunningPlan | None) -> int | tuple[Cut, ...]:
    if running is not None:
        return running.cuts
    wanted = parse_stages(command.stages or "2")
    if not isinstance(wanted, int) and command.backend != "auto":
        raise UsageError("--stages names an engine for each stage already; leave --backend out")
    if isinstance(wanted, int):
        parse_backends(command.backend, wanted)  # what is wrong is said before anything is downloaded
    return wanted


def _subject(
    checkpoint: Checkpoint, command: VerifyCommand, wanted: int | tuple[Cut, ...], bits: int | None
) -> Subject:
    facts = read_facts(checkpoint, bits)
    if command.tokens > facts.context_tokens:
        raise UsageError(f"--tokens {command.tokens} is beyond the model's context of {facts.context_tokens}")
    if isinstance(wanted, int):
        backends: tuple[Backend | None, ...] = parse_backends(command.backend, wanted) or (None,) * wanted
        cuts = [Cut(layers, backend) for layers, backend in zip(even_cut(facts, wanted), backends, strict=True)]
    else:
        cuts = list(wanted)
        check_cuts(facts, cuts, "the running plan" if command.url else "--stages")
    if missing := {cut.backend for cut in cuts if cut.backend is not None} - facts.backends:
        able = ", ".join(sorted(facts.backends))
        raise UsageError(f"this model runs on {able} alone, not on {min(missing)}; name other engines")
    parts = tuple(Part(stage, cut.layers, _device_for(facts, cut.backend)) for stage, cut in enumerate(cuts))
    return Subject(checkpoint.folder, facts, parts, narrow=command.wire_bits is not None)


def _device_for(facts: ModelFacts, backend: Backend | None) -> Device:
    return _best_device(facts) if backend is None else detect_devices(backend)[0]


def _best_device(facts: ModelFacts) -> Device:
    """What `join` would choose, if the model runs on it."""
    best = detect_devices()[0]
    return best if best.backend in facts.backends else detect_devices(min(facts.backends))[0]


def _reference(checkpoint: Checkpoint, facts: ModelFacts) -> Device:
    """transformers on the processor, whose arithmetic no driver and no fast kernel changes; where it is not installed,
    cannot read the checkpoint or has no room to unpack what MLX packed, mlx-lm where MLX runs best."""
    engines = facts.backends & read_machine().engines
    if Backend.TORCH not in engines:
        return detect_devices(Backend.MLX)[0]
    (processor,) = detect_devices(Backend.TORCH, "cpu")
    is_packed_so = facts.quantization is not None and facts.quantization.kind in MLX_MODES
    by_mlx = is_packed_so and any(name.endswith(".scales") for name in checkpoint.tensors)  # gpt-oss' own: `_scales`
    if by_mlx and Backend.MLX in engines:
        unpacked_bytes = whole_bytes(checkpoint, facts, Backend.TORCH)
        if unpacked_bytes > measure_memory(processor).budget_bytes:
            return detect_devices(Backend.MLX)[0]
    return processor


def whole_bytes(checkpoint: Checkpoint, facts: ModelFacts, backend: Backend) -> int:
    """What the reference holds at most. mlx-lm packs what its stages pack, transformers holds what is stored; but
    where that is packed or put in other words by mlx-lm, it is read into a dictionary, and from there becomes a
    model."""
    if backend is Backend.MLX:
        return facts.stored_bytes
    if facts.quantization is None or facts.bits is not None:
        from node.engines.torch.unconverted import is_converted

        return (2 if is_converted(checkpoint) else 1) * read_facts(checkpoint).stored_bytes
    used = (tensor for tensor in checkpoint.tensors.values() if not isinstance(part_of(tensor.name), Unused))
    matrices = read_matrices(used, facts.quantization, str(checkpoint.folder)).values()
    return 2 * facts.dtype.size_bytes * sum(prod(matrix.shape) for matrix in matrices)


def check_memory(subject: Subject, reference_bytes: int, reference: Device, tokens: int) -> None:
    """Refuse now what would otherwise end in swapping, or in a process that the system kills."""
    facts = subject.facts
    needs = [(reference_bytes, reference, "the reference holds the whole model", "use a machine with more memory")]
    for part in subject.stages:
        on_cpu = part.device.device == CPU
        cost = stage_cost(facts, part.layers, part.device.backend, context=tokens, users=SEQUENCES, on_cpu=on_cpu)
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
