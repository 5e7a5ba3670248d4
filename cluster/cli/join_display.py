"""What the screen of `potluck join` shows: what the node offers, and what becomes of it. People or scripts."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from cluster.cli.running import command_name
from cluster.quantities import format_bytes
from cluster.types import LayerRange
from node.happenings import AtWork, Failed, Free, NodeHappening, Preparing, Taken
from node.server import NodeUp


class JoinDisplay:
    """Lines for people, or JSON lines for scripts, on standard output."""

    def __init__(self, *, as_json: bool, looks_for: str) -> None:
        self._as_json = as_json
        self._looks_for = looks_for  # options that `serve` needs to find this node
        self._name = "this node"
        self._console = Console(highlight=False, soft_wrap=True)

    def up(self, up: NodeUp, *, found: bool) -> None:
        """The node can be reached; `found` says whether mDNS tells others where."""
        facts = up.facts
        self._name = facts.name
        if self._as_json:
            _write(
                event="up",
                id=facts.id,
                name=facts.name,
                addresses=list(up.addresses),
                backend=facts.backend.value,
                device=facts.device,
                budget_bytes=facts.memory.budget_bytes,
                mdns_problem=up.mdns_problem,
            )
            return
        offer = f"{format_bytes(facts.memory.budget_bytes)} of {facts.backend.value} on {facts.device}"
        self._print(f"{facts.name} offers {offer} ({facts.memory.explained})")
        if up.mdns_problem:
            self._print(f"! mDNS does not work here: {up.mdns_problem}")
        serve = f"{command_name()} serve MODEL{self._looks_for}"
        how = f"{serve}   (or, where mDNS does not reach: --peer {facts.address})"
        self._print(f"Waiting for a coordinator: {how if found else f'{serve} --peer {facts.address}'}")

    def tell(self, happening: NodeHappening) -> None:
        match happening:
            case Taken(coordinator):
                self._say(f"is used by coordinator {coordinator}", "taken", coordinator=coordinator)
            case Preparing(layers, count):
                self._say(f"prepares layers {_span(layers, count)}", "preparing", layers=_pair(layers))
            case AtWork(layers, count, took_s):
                text = f"is at work: layers {_span(layers, count)}, ready after {took_s:.1f} s"
                self._say(text, "at_work", layers=_pair(layers), took_s=took_s)
            case Failed(problem):
                self._say(f"has a problem: {problem}", "failed", problem=problem)
            case Free(reason):
                self._say(f"is free again: {reason}", "free", reason=reason)

    def _say(self, text: str, event: str, **values: object) -> None:
        if self._as_json:
            _write(event=event, **values)
        else:
            self._print(f"{self._name} {text}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False)


def _span(layers: LayerRange, count: int) -> str:
    return f"{layers.first} to {layers.last - 1} of {count}" if len(layers) > 1 else f"{layers.first} of {count}"


def _pair(layers: LayerRange) -> list[int]:
    return [layers.first, layers.last]


def _write(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()
