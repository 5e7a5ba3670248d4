"""`potluck demo`: a cluster of real processes on this machine, from nothing to an answer, and away again."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from cluster.cli.child import Process, running
from cluster.cli.endpoint import Endpoint, delta_text
from cluster.cli.running import command_name
from cluster.cli.status import plan_table, time_lines
from cluster.discovery import multicast_works
from cluster.errors import ClusterError, UsageError
from cluster.interfaces import choose_interfaces, read_interfaces
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import ModelFacts, read_facts
from cluster.placement import stage_cost
from cluster.quantities import format_bytes
from cluster.types import Backend, LayerRange
from coordinator.builtin import demo_model_path

_NODES = ("kitchen", "study", "attic")
_BUDGET_SHARE = 0.25
"""How far each node's budget is on the way from what a third of the layers takes to what all of them take."""

QUESTION = "What is Potluck?"
ANSWER = (
    "Potluck pools the Macs, GPUs and PCs on one network into a single AI endpoint. Each machine holds some layers "
    "of a model, and together they answer you like one big computer."
)
"""What the built-in model says on a single machine; deploy/demo_model/facts.py taught it."""

_START_S = 180.0
"""Three processes importing torch or mlx on two slow cores; far beyond this something is wrong."""

_CONTEXT = 1024
"""Enough for a chat with the built-in model, and small beside its weights."""


def demo_command(*, keep: bool, port: int, question: str) -> int:
    console = Console(highlight=False, soft_wrap=True)
    # Leaving by an exception stops every process on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    backends = demo_backends()
    facts = read_facts(open_checkpoint(demo_model_path()))
    alone = {name: _needed_bytes(facts, Backend(name), LayerRange(0, facts.layer_count)) for name in backends}
    budgets = {name: demo_budget(facts, Backend(name)) for name in backends}
    takes = " and ".join(f"{format_bytes(needed)} on {name}" for name, needed in alone.items())
    may_use = " and ".join(f"{format_bytes(budget)} on {name}" for name, budget in budgets.items())
    console.print(
        f"Serving the built-in model takes {takes} (weights, cache, workspace). "
        f"Each of three nodes may use {may_use}, so none could hold it alone.",
        markup=False,
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potluck-demo-")))
        mdns = asyncio.run(multicast_works(choose_interfaces(read_interfaces(), "127.0.0.1")))
        found = "over mDNS" if mdns else "at static addresses, since multicast is blocked here"
        console.print(f"A coordinator and three nodes ({', '.join(backends)}) start; they meet {found} …")
        started = time.monotonic()
        names = Names(cluster=f"demo-{secrets.token_hex(3)}", folder=folder, mdns=mdns)
        coordinator = stack.enter_context(_coordinator(names, port))
        url = str(coordinator.wait_for("starting", _START_S)["url"])
        announce_to = str(coordinator.wait_for("listening", _START_S)["port"])
        nodes = [
            stack.enter_context(_node(names, name, backend, budgets[backend], announce_to))
            for name, backend in zip(_NODES, backends, strict=True)
        ]
        coordinator.wait_for("ready", _START_S, needs=nodes)
        endpoint = Endpoint(url)
        console.print(f"Ready after {time.monotonic() - started:.1f} s.\n")
        status = endpoint.get("/potluck/status")
        for line in plan_table(status):
            console.print(line, markup=False)
        answer = _ask(console, endpoint, question)
        status = endpoint.get("/potluck/status")
        for line in time_lines(status):
            console.print(line, markup=False)
        right = judge(console, question, answer)
        if keep and right:
            _keep(console, endpoint.url, names, announce_to, [coordinator, *nodes])
    return 0 if right else 1


def demo_budget(facts: ModelFacts, backend: Backend) -> int:
    """Enough for a third of the layers on this engine, whichever, and too little for all of them."""
    cuts = [facts.layer_count * stage // len(_NODES) for stage in range(len(_NODES) + 1)]
    third = max(_needed_bytes(facts, backend, LayerRange(*cut)) for cut in pairwise(cuts))
    alone = _needed_bytes(facts, backend, LayerRange(0, facts.layer_count))
    return int(third + _BUDGET_SHARE * (alone - third))


def _needed_bytes(facts: ModelFacts, backend: Backend, layers: LayerRange) -> int:
    return stage_cost(facts, layers, backend, context=_CONTEXT, users=1, on_cpu=True).memory_bytes


def demo_backends() -> tuple[str, ...]:
    """Both engines where both are installed; three of one where only that one is."""
    have = [name for name, module in (("torch", "torch"), ("mlx", "mlx_lm")) if importlib.util.find_spec(module)]
    match have:
        case ["torch", "mlx"]:
            return ("torch", "mlx", "torch")
        case [only]:
            return (only, only, only)
        case _:
            raise UsageError("no engine is installed: pip install 'potluck[torch]' or 'potluck[mlx]'")


@dataclass(frozen=True, slots=True)
class Names:
    """What tells this demo's processes from any other cluster's."""

    cluster: str
    folder: Path
    mdns: bool


def _coordinator(names: Names, port: int) -> contextlib.AbstractContextManager[Process]:
    arguments = ["serve", "demo", "--no-local-node", "--min-nodes", str(len(_NODES)), "--port", str(port)]
    arguments += ["--context", str(_CONTEXT), "--users", "1", "--cluster", names.cluster]
    arguments += ["--cluster-host", "127.0.0.1", "--cluster-port", "0", "--state", str(names.folder / "coordinator")]
    arguments += ["--exit-with", str(os.getpid())]
    return running("coordinator", arguments + ([] if names.mdns else ["--no-mdns"]))


def _node(
    names: Names, name: str, backend: str, budget_bytes: int, announce_to: str
) -> contextlib.AbstractContextManager[Process]:
    arguments = ["join", "--name", name, "--cluster", names.cluster, "--backend", backend, "--device", "cpu"]
    arguments += ["--memory", str(budget_bytes), "--threads", "1", "--host", "127.0.0.1"]
    arguments += ["--state", str(names.folder / name), "--exit-with", str(os.getpid())]
    return running(
        f"node {name}",
        arguments + ([] if names.mdns else ["--no-mdns", "--coordinator", f"127.0.0.1:{announce_to}"]),
    )


def _ask(console: Console, endpoint: Endpoint, question: str) -> str:
    console.print(f"\n> {question}", markup=False)
    body = {"model": "demo", "messages": [{"role": "user", "content": question}], "temperature": 0}
    pieces = []
    for event in endpoint.stream("/v1/chat/completions", body):
        pieces.append(delta_text(event))
        console.print(pieces[-1], end="", markup=False)
    console.print("\n")
    return "".join(pieces)


def judge(console: Console, question: str, answer: str) -> bool:
    """Whether the cluster said what the model says on one machine. Only the usual question's answer is known."""
    if question != QUESTION:
        return bool(answer.strip())
    if answer.strip() == ANSWER:
        return True
    console.print(f"That is not what the model says on a single machine, which is: {ANSWER}", markup=False)
    return False


def _keep(console: Console, url: str, names: Names, announce_to: str, processes: list[Process]) -> None:
    """Leave everything running until Ctrl-C, or until one of the processes ends, and say how to use it."""
    how = "" if names.mdns else f" --coordinator 127.0.0.1:{announce_to} --no-mdns"
    potluck = command_name()
    guests = [
        f"  {potluck} join --cluster {names.cluster} --host 127.0.0.1{how} --name {guest} "
        f"--state {names.folder / guest}"
        for guest in ("guest", "visitor")
    ]
    for line in (
        "",
        f"The endpoint is {url}/v1. In another terminal:",
        f"  {potluck} chat --url {url}",
        f"  {potluck} status --url {url}",
        *guests,
        "Guests join as spares: the three hold the model already.",
        "Ctrl-C stops everything.",
    ):
        console.print(line, markup=False)
    with contextlib.suppress(KeyboardInterrupt):
        while not (over := [process for process in processes if process.exit_code is not None]):
            time.sleep(1)
        raise ClusterError(f"the {over[0].name} ended. It said:\n{over[0].output()[-2000:]}")
