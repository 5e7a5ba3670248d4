"""What people see of a coordinator's work: progress while it loads, the plan as a bar for each machine.

Plain lines where standard output is no terminal; one JSON document a line where a script reads.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import shlex
import sys
from collections.abc import Mapping
from typing import assert_never

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cluster.cli.running import command_name
from cluster.models.facts import ModelFacts
from cluster.nodes import LoadPhase, LoadReport, NodeFacts
from cluster.placement import describe
from cluster.plan import Plan
from cluster.quantities import format_bytes
from coordinator.happenings import (
    Happening,
    Interrupted,
    Listening,
    Loading,
    ModelOpened,
    NodeJoined,
    NodeLeft,
    NodeTurnedAway,
    Planned,
    Ready,
    Starting,
    Tell,
    Waiting,
    Working,
)

_BAR_CELLS = 48
_PLAIN_STEP = 0.25
"""Without a terminal, progress is one line per quarter."""


class Display:
    """Renders happenings for people."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._url = ""
        self._serving = False
        self._listening: Listening | None = None
        self._progress: Progress | None = None
        self._tasks: dict[str, int] = {}
        self._quarters: dict[str, int] = {}

    def tell(self, happening: Happening) -> None:
        match happening:
            case Working(what, done_bytes, total_bytes):
                self._advance(what, done_bytes, total_bytes)
            case Loading(node, report):
                if report.phase is not LoadPhase.READY and report.total_bytes:
                    what = f"{node}: {report.phase.value}"
                    self._advance(what, report.done_bytes, report.total_bytes, report.left_s)
            case _:
                self._end_progress()
                self._say(happening)

    def _say(self, happening: Happening) -> None:
        match happening:
            case Starting(url):
                self._url = url
            case ModelOpened(name, facts):
                size = format_bytes(facts.stored_bytes)
                self._print(f"{name}: {facts.architecture}, {facts.layer_count} layers, {size} in {facts.format}")
                if self._listening is not None:  # only now: a wrong MODEL has ended this already
                    self._how_to_join(self._listening)
            case Listening():
                self._listening = happening
            case Waiting(reason):
                self._print(f"… {reason}")
            case NodeJoined(facts):
                offer = f"{format_bytes(facts.memory.budget_bytes)} of {facts.backend.value} on {facts.device}"
                self._print(f"+ {facts.name} offers {offer} ({facts.memory.explained})")
                if self._serving:
                    self._print("  a spare: the running plan does without it; serve with --min-nodes to spread further")
            case NodeLeft(name, reason):
                self._print(f"- {name} left: {reason}")
            case NodeTurnedAway(who, reason):
                self._print(f"× {who} is not used: {reason}")
            case Planned(plan, facts, nodes):
                for line in plan_lines(plan, facts, nodes):
                    self._print(line)
            case Ready(first_token_s):
                self._serving = True
                self._print(f"ready: the first token took {first_token_s:.2f} s. The endpoint is {self._url}/v1")
                self._print(f"  {command_name()} chat --url {self._url}      (Ctrl-C here stops everything)")
            case Interrupted(reason):
                self._serving = False
                self._print(f"! interrupted: {reason}")
            case Working() | Loading():
                pass
            case _:
                assert_never(happening)

    def _how_to_join(self, listening: Listening) -> None:
        join = f"{command_name()} join"
        if listening.cluster != "default":
            join += f" --cluster {shlex.quote(listening.cluster)}"
        if listening.mdns_problem:
            self._print(f"! mDNS does not work here: {listening.mdns_problem}")
        self._print("To add a machine, run there:")
        self._print(f"  {join}")
        for address in listening.addresses[:1]:
            self._print(f"  {join} --coordinator {address}      (where mDNS does not reach)")
        self._print("To add more nodes on this machine:")
        for name in ("second", "third"):
            self._print(f"  {join} --name {name} --state ~/.potluck-{name}")

    def _advance(self, what: str, done: int, total: int, left_s: float | None = None) -> None:
        if not self._console.is_terminal:
            quarter = int(done / max(total, 1) / _PLAIN_STEP)
            if self._quarters.get(what, -1) < quarter:
                self._quarters[what] = quarter
                left = f", {left_s:.0f} s left" if left_s else ""
                self._print(f"  {what}: {format_bytes(done)} of {format_bytes(total)}{left}")
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._tasks = {}
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)  # type: ignore[arg-type]

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._quarters.clear()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def plan_lines(plan: Plan, facts: ModelFacts, nodes: tuple[NodeFacts, ...]) -> list[str]:
    """The plan as a bar for each machine: which layers it holds, and what they take of its budget."""
    rows = describe(plan, facts, nodes)
    width = max(len(row.name) for row in rows)
    lines = [f"Plan: {plan.layer_count} layers on {len(rows)} node{'s' if len(rows) > 1 else ''}, context "
             f"{plan.context_tokens} tokens for {plan.users} at once"]  # fmt: skip
    for row in rows:
        bar = layer_bar(row.layers.first, row.layers.last, plan.layer_count)
        lines.append(
            f"  {row.name:<{width}} {row.backend.value:<5} |{bar}| layers {row.layers}: "
            f"{format_bytes(row.weight_bytes)} weights + {format_bytes(row.kv_bytes)} KV + "
            f"{format_bytes(row.workspace_bytes)} workspace = {format_bytes(row.budget_bytes - row.free_bytes)} of "
            f"{format_bytes(row.budget_bytes)}; {format_bytes(row.reserve_bytes)} of "
            f"{format_bytes(row.total_bytes)} kept in reserve"
        )
    for node, reason in plan.left_out:
        name = next((facts.name for facts in nodes if facts.id == node), node)
        lines.append(f"  {name} is left out: {reason}")
    return lines


def layer_bar(first: int, last: int, count: int) -> str:
    """`count` layers as cells; those in [first, last) are filled."""
    cells = min(_BAR_CELLS, count * 2)
    begin, end = round(first / count * cells), round(last / count * cells)
    return "·" * begin + "█" * (end - begin) + "·" * (cells - end)


def json_teller() -> Tell:
    """One JSON document a line: {"event": "ready", ...}."""

    def tell(happening: Happening) -> None:
        name = type(happening).__name__
        event = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
        sys.stdout.write(json.dumps({"event": event, **_plain(happening)}) + "\n")
        sys.stdout.flush()

    return tell


def _plain(value: object) -> dict[str, object]:
    """A happening's fields as JSON values; model facts are long and stay out."""
    return {
        field.name: _json(getattr(value, field.name))
        for field in dataclasses.fields(value)  # type: ignore[arg-type]
        if field.name != "facts" or isinstance(getattr(value, field.name), NodeFacts)
    }


def _json(value: object) -> object:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, LoadReport):
        return {**_plain(value), "left_s": value.left_s}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(value)
    if isinstance(value, tuple | list | frozenset):
        return [_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(_json(key)): _json(item) for key, item in value.items()}
    return value


def teller(as_json: bool) -> Tell:
    """How `serve` reports."""
    return json_teller() if as_json else Display(Console(highlight=False)).tell
