"""`potluck serve`: a coordinator, and a node on this machine as a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.addresses import split_host_port
from cluster.cli.display import teller
from cluster.cli.running import run_until_stopped, stop_with_parent
from cluster.errors import UsageError
from cluster.interfaces import host_port
from cluster.models.quantising import check_bits
from cluster.placement import Ask
from cluster.quantities import parse_size_bytes
from cluster.state_dir import StateDir, default_state_path
from coordinator.deadlines import Deadlines
from coordinator.happenings import Happening, Listening, Starting, Tell
from coordinator.http import listen
from coordinator.hub import parse_model
from coordinator.narrowing import read_wire_bits
from coordinator.opening import WantedModel
from coordinator.server import Coordinator, ServeOptions, coordinator_state
from node.supervisor import supervise

_CONTEXT_MIN = 16
"""Below this no question fits, let alone an answer."""


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """The options as typed."""

    model: str
    revision: str | None
    host: str
    port: int
    cluster: str
    local_node: bool
    min_nodes: int
    context: str
    users: int
    bits: int | None
    queue_timeout_s: float
    first_token_timeout_s: float
    token_timeout_s: float
    request_timeout_s: float
    grace_s: float
    prefix_cache: bool
    wire_bits: str | None
    exclude: tuple[str, ...]
    peers: tuple[str, ...]
    mdns: bool
    cluster_host: str
    cluster_port: int
    weights_max: str | None
    state: Path | None
    exit_with: int | None
    as_json: bool


def serve_command(command: ServeCommand) -> int:
    ask = Ask(parse_context(command.context), command.users, max(1, command.min_nodes))
    bits = check_bits(command.bits)
    weights_bytes_max = parse_size_bytes(command.weights_max) if command.weights_max else None
    wire_bits = read_wire_bits(command.wire_bits)
    for peer in command.peers:
        split_host_port(peer)
    listener = listen(command.host, command.port)
    url = f"http://{host_port(command.host, listener.getsockname()[1])}"
    root = command.state or default_state_path()
    with listener, StateDir(coordinator_state(root)) as state:
        tell = teller(command.as_json)
        tell(Starting(url))
        parse_model(command.model)  # a wrong one ends this before anything begins; nothing is downloaded yet
        options = ServeOptions(
            model=WantedModel(command.model, command.revision, bits, weights_bytes_max),
            http=listener,
            http_host=command.host,
            cluster=command.cluster,
            cluster_host=command.cluster_host,
            cluster_port=command.cluster_port,
            min_nodes=command.min_nodes,
            ask=ask,
            deadlines=Deadlines(
                queue_s=command.queue_timeout_s,
                first_token_s=command.first_token_timeout_s,
                between_tokens_s=command.token_timeout_s,
                total_s=command.request_timeout_s,
            ),
            grace_s=command.grace_s,
            exclude=command.exclude,
            peers=command.peers,
            mdns=command.mdns,
            state=state,
            prefix_cache=command.prefix_cache,
            wire_bits=wire_bits,
        )

        async def work(stop: asyncio.Event) -> None:
            await _serve(options, command, root, tell, stop)

        return run_until_stopped(work)


def parse_context(text: str) -> int | None:
    """A number of tokens, or None for `auto`."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < _CONTEXT_MIN:
        raise UsageError(
            f"expected --context auto or a number of tokens such as 8192 (at least {_CONTEXT_MIN}), found {text!r}"
        )
    return int(text)


async def _serve(options: ServeOptions, command: ServeCommand, root: Path, tell: Tell, stop: asyncio.Event) -> None:
    local: list[asyncio.Task[int]] = []

    def on_happening(happening: Happening) -> None:
        if stop.is_set():
            return  # what breaks from now on breaks because everything ends
        tell(happening)
        if isinstance(happening, Listening) and command.local_node:
            # Only now is the port known that the node announces itself to.
            arguments = local_node_arguments(command, happening.port, root)
            # It has nothing to say that this screen does not show; its errors go to standard error.
            node = supervise(arguments, "on this machine", stop, asyncio.subprocess.DEVNULL)
            local.append(asyncio.create_task(node))

    watching = asyncio.create_task(stop_with_parent(command.exit_with, stop))
    try:
        await Coordinator(options, on_happening).run(stop)
    finally:
        stop.set()
        watching.cancel()
        await asyncio.gather(*local, return_exceptions=True)


def local_node_arguments(command: ServeCommand, port: int, root: Path) -> list[str]:
    """The command line of the node on this machine: a process of its own, so that its crash is not ours."""
    host = command.cluster_host or "127.0.0.1"
    arguments = potluck_command("join", "--cluster", command.cluster, "--coordinator", host_port(host, port))
    arguments += ["--no-mdns", "--state", str(root / "local-node"), "--exit-with", str(os.getpid())]
    if command.cluster_host:
        arguments += ["--host", command.cluster_host]
    arguments += ["--weights-max", command.weights_max] if command.weights_max else []
    return arguments


def potluck_command(*arguments: str) -> list[str]:
    """Run this very installation, whatever `potluck` means on the PATH."""
    return [sys.executable, "-m", "cluster.cli.main", *arguments]
