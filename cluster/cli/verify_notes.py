"""What a run of `potluck verify` could not see, or could not judge, for the person who reads its report."""

from __future__ import annotations

from cluster.cli.fingerprints import Fingerprints
from cluster.cli.verify_cut import RunningPlan
from cluster.models.checkpoint import Checkpoint
from cluster.models.families import family_of
from cluster.models.windows import read_windows
from cluster.types import Backend, DType
from node.hardware import Device
from node.verification import Subject


def notes_on_input(checkpoint: Checkpoint, subject: Subject, tokens: int) -> tuple[str, ...]:
    """What so many tokens, or their experts, cannot show."""
    notes = []
    smallest, context = _smallest_window(checkpoint, subject), subject.facts.context_tokens
    if tokens <= smallest < context:  # no input leaves a window as long as the context
        beyond = min(smallest * 3 // 2, context)
        notes.append(f"{tokens} tokens lie within the window of {smallest}; --tokens {beyond} passes it")
    if subject.routed and subject.facts.dtype is not DType.F32:
        notes.append("errors are the median token's: in 16 bits a router may choose another expert for a few tokens")
    return tuple(notes)


def notes_on_reference(checkpoint: Checkpoint, subject: Subject, reference: Device, tokens: int) -> tuple[str, ...]:
    """Where the reference is known to compute something else than the model's publisher, and the engines do not."""
    if reference.backend is not Backend.MLX:
        return ()
    _, config = family_of(checkpoint.config, str(checkpoint.folder))
    remedy = "so right layers are called wrong; with the extra [torch] transformers is the reference"
    rotation = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(rotation, dict) and rotation.get("truncate") is False:
        return (f"mlx-lm rounds where yarn's stretching begins and this model does not, {remedy}",)
    if subject.facts.model_type == "gemma2" and tokens > _smallest_window(checkpoint, subject):
        return (f"mlx-lm knows no windows in Gemma 2, {remedy}",)
    return ()


def notes_on_plan(subject: Subject, running: RunningPlan | None) -> tuple[str, ...]:
    """Where the cluster computes on something that this machine has not used."""
    if running is None:
        return ()
    return tuple(
        f"stage {part.stage} runs on {device} in the cluster, and was computed on {part.device.device} here"
        for part, device in zip(subject.stages, running.devices, strict=True)
        if device != part.device.device
    )


def notes_on_store(store: Fingerprints) -> tuple[str, ...]:
    return tuple(f"the fingerprint {name} is damaged and counts as none; remove it" for name in sorted(store.damaged))


def _smallest_window(checkpoint: Checkpoint, subject: Subject) -> int:
    """How far the layer that looks back least looks back; the context where all see everything."""
    where, facts = str(checkpoint.folder), subject.facts
    family, config = family_of(checkpoint.config, where)
    windows = read_windows(family, config, facts.layer_count, where)
    return min((window for window in windows if window is not None), default=facts.context_tokens)
