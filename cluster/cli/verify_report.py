"""How `potluck verify` shows itself: progress while it works, then the verdict as a table or a JSON document.

Knows nothing of how the verdict came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from cluster.cli.drift import Drift
from cluster.models.facts import ModelFacts
from node.hardware import Device, engine_version
from node.verdict import Comparison, NarrowChain, Verdict


@dataclass(frozen=True, slots=True)
class Report:
    """A verdict and what it is about."""

    model: str
    revision: str
    facts: ModelFacts
    tokens: int
    reference: Device
    verdict: Verdict
    drifts: tuple[Drift, ...]
    kept: bool  # the fingerprints, to compare with next time
    notes: tuple[str, ...]


class Telling:
    """What is being done, on standard error: a bar on a terminal, else a line for each thing."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._columns = (TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn())
        self._bar = Progress(
            *self._columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._task = self._bar.add_task("", total=None)
        self._what = ""

    def __enter__(self) -> Telling:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what and not self._console.is_terminal:
            self._console.print(f"  {what}", markup=False, soft_wrap=True)
        self._what = what
        self._bar.update(self._task, description=what, completed=done, total=total or None)


def show(report: Report, console: Console) -> None:
    facts, verdict = report.facts, report.verdict

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    say(f"{report.model}: {facts.architecture}, {facts.layer_count} layers, {facts.format}; {report.tokens} tokens")
    say(f"Reference: the whole model by {engine_version(report.reference.backend)} on {report.reference.device}")
    table = Table("", "on", "largest error", "tolerance", "", box=None, pad_edge=False, header_style="bold")
    for stage in verdict.stages:
        _add(table, f"stage {stage.part.stage}: layers {stage.part.layers}", stage)
    drawn = alike(verdict.chain.expected_tokens, verdict.chain.found_tokens)
    _add_row(table, "all stages chained", drawn, verdict.chain.error, verdict.chain.tolerance, verdict.chain.within)
    if verdict.narrow is not None:
        narrow = verdict.narrow
        drawn = alike(narrow.expected_tokens, narrow.found_tokens)
        table.add_row("chained, prompts in 8 bits between them", drawn, f"{narrow.error:.1e}", "", "")
    for layer in verdict.layers:
        _add(table, f"layer {_layer_name(layer, facts)}", layer)
    console.print(table)
    say("Errors are relative to the rms of what the reference computes from the same input.")
    for drift in report.drifts:
        say(drift_line(drift))
    if any(drift.beyond for drift in report.drifts):
        say("Accepted, and compared with from now on." if report.kept else "If that is right, repeat with --accept.")
    for note in report.notes:
        say(f"Note: {note}.")
    say(verdict_line(report))


def alike(expected: Sequence[int], found: Sequence[int]) -> str:
    return f"{sum(a == b for a, b in zip(expected, found, strict=True))} of {len(expected)} tokens alike"


def verdict_line(report: Report) -> str:
    """The result in one line, with the worst layer."""
    verdict, worst = report.verdict, report.verdict.worst_layer
    named = (
        f"layer {_layer_name(worst, report.facts)} of stage {worst.part.stage} on {worst.part.device.backend}, "
        f"{worst.error:.2g} where {worst.tolerance:.2g} is allowed"
    )
    if verdict.within:
        return f"Everything is within tolerance. The worst layer is {named}."
    layers = [str(layer.part.layers.first) for layer in verdict.layers if not layer.within]
    wrong = [f"stage {stage.part.stage}" for stage in verdict.stages if not stage.within]
    wrong += [] if verdict.chain.within else ["the chain"]
    wrong += [f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"] if layers else []
    return f"NOT within tolerance: {'; '.join(wrong)}. The worst layer is {named}."


def drift_line(drift: Drift) -> str:
    """What has moved since this engine and device were looked at before."""
    maker, count = drift.maker, len(drift.layers)
    name = f"Fingerprint of {maker.versions} on {maker.device} ({maker.hardware})"
    since = next((layer.since for layer in (*drift.beyond, *drift.compared) if layer.since is not None), None)
    if since is None:
        return f"{name}: the first one of {count} layers."
    before = f"{since.made}" if since.maker.versions == maker.versions else f"{since.maker.versions}, {since.made}"
    worst, added = drift.worst, count - len(drift.compared)
    more = f"; {added} layers were not looked at then" if added else ""
    if worst is None or worst.by is None:
        return f"{name}: every bit as on {before}{more}."
    how_far = f"most layer {worst.layers.first}, by {worst.by:.1g} where {worst.allowed:.1g} is rounding"
    if not drift.beyond:
        return f"{name}: moved within rounding since {before}: {how_far}{more}."
    moved = ", ".join(str(layer.layers.first) for layer in drift.beyond)
    return f"{name}: DRIFT since {before}: layers {moved}, {how_far}{more}."


def _layer_name(layer: Comparison, facts: ModelFacts) -> str:
    layers = layer.part.layers
    name = str(layers.first) if len(layers) == 1 else str(layers)
    ends = ["embedding"] if layers.first == 0 else []
    ends += ["head"] if layers.last == facts.layer_count else []
    return f"{name} (with {' and '.join(ends)})" if ends else name


def _add(table: Table, name: str, comparison: Comparison) -> None:
    device = comparison.part.device
    on = f"{device.backend} on {device.device}"
    _add_row(table, name, on, comparison.error, comparison.tolerance, comparison.within)


def _add_row(table: Table, name: str, on: str, error: float, tolerance: float, within: bool) -> None:
    table.add_row(
        name, on, f"{error:.1e}", f"{tolerance:.1e}", "ok" if within else "WRONG", style="" if within else "red"
    )


def document(report: Report) -> dict[str, object]:
    verdict, reference = report.verdict, report.reference
    return {
        "ok": verdict.within,
        "model": report.model,
        "revision": report.revision,
        "architecture": report.facts.architecture,
        "dtype": report.facts.dtype.value,
        "format": report.facts.format,
        "tokens": report.tokens,
        "reference": {
            "library": engine_version(reference.backend),
            "backend": reference.backend.value,
            "device": reference.device,
        },
        "stages": [_comparison_document(stage) for stage in verdict.stages],
        "layers": [_comparison_document(layer) for layer in verdict.layers],
        "chain": {
            "error": _number(verdict.chain.error),
            "tolerance": verdict.chain.tolerance,
            "ok": verdict.chain.within,
            "expected_tokens": verdict.chain.expected_tokens,
            "found_tokens": verdict.chain.found_tokens,
        },
        "narrow_chain": None if verdict.narrow is None else _narrow_document(verdict.narrow),
        "worst_layer": verdict.worst_layer.part.layers.first,
        "drifted": any(drift.beyond for drift in report.drifts),
        "fingerprints": [_drift_document(drift) for drift in report.drifts],
        "fingerprints_kept": report.kept,
        "notes": report.notes,
    }


def _narrow_document(narrow: NarrowChain) -> dict[str, object]:
    return {
        "error": _number(narrow.error),
        "expected_tokens": narrow.expected_tokens,
        "found_tokens": narrow.found_tokens,
    }


def _comparison_document(comparison: Comparison) -> dict[str, object]:
    """Layers are [first_layer, last_layer), as everywhere."""
    part = comparison.part
    return {
        "stage": part.stage,
        "backend": part.device.backend.value,
        "device": part.device.device,
        "first_layer": part.layers.first,
        "last_layer": part.layers.last,
        "error": _number(comparison.error),
        "tolerance": comparison.tolerance,
        "ok": comparison.within,
    }


def _drift_document(drift: Drift) -> dict[str, object]:
    maker = drift.maker
    return {
        "backend": maker.backend.value,
        "device": maker.device,
        "hardware": maker.hardware,
        "versions": maker.versions,
        "layers": [
            {
                "first_layer": layer.layers.first,
                "last_layer": layer.layers.last,
                "since": None if layer.since is None else layer.since.maker.versions,
                "since_date": None if layer.since is None else layer.since.made,
                "identical": layer.identical,
                "moved": None if layer.by is None else _number(layer.by),
                "allowed": layer.allowed,
                "ok": not layer.beyond,
            }
            for layer in drift.layers
        ],
    }


def _number(error: float) -> float | None:
    """JSON has no word for infinity or NaN."""
    return error if isfinite(error) else None
