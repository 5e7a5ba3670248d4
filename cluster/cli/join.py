"""`potluck join`: one node, or a supervisor with one node for each device."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path

from cluster.addresses import split_host_port
from cluster.cli.join_display import JoinDisplay
from cluster.cli.running import run_until_stopped, stop_with_parent
from cluster.cli.serve import potluck_command
from cluster.errors import UsageError
from cluster.quantities import MIB, parse_fraction, parse_size_bytes
from cluster.state_dir import default_state_path
from node.hardware import Device, detect_devices
from node.server import NodeOptions, run_node
from node.supervisor import supervise


@dataclass(frozen=True, slots=True)
class JoinCommand:
    """The options as typed."""

    name: str | None
    cluster: str
    backend: str
    device: str
    memory: str | None
    reserve: str | None
    threads: int | None
    host: str
    port: int
    coordinators: tuple[str, ...]
    mdns: bool
    state: Path | None
    weights_max: str | None
    exit_with: int | None
    as_json: bool


def join_command(command: JoinCommand) -> int:
    for address in command.coordinators:
        split_host_port(address)
    devices = detect_devices(command.backend, command.device)
    root = command.state or default_state_path() / "node"
    name = command.name or socket.gethostname().partition(".")[0] or "node"
    if len(devices) > 1:
        return _supervise_all(command, devices, root, name)
    options = _options(command, devices[0], root, name)
    cluster = "" if command.cluster == "default" else f" --cluster {shlex.quote(command.cluster)}"
    display = JoinDisplay(as_json=command.as_json, looks_for=cluster)

    async def work(stop: asyncio.Event) -> None:
        watching = asyncio.create_task(stop_with_parent(command.exit_with, stop))
        try:
            await run_node(
                options, lambda up: display.up(up, found=command.mdns and not up.mdns_problem), display.tell, stop
            )
        finally:
            watching.cancel()

    return run_until_stopped(work)


def _options(command: JoinCommand, device: Device, root: Path, name: str) -> NodeOptions:
    return NodeOptions(
        name=name,
        cluster=command.cluster,
        device=device,
        memory_cap_bytes=_memory_bytes(command.memory) if command.memory else None,
        reserve_fraction=parse_fraction(command.reserve) if command.reserve else None,
        threads=command.threads,
        host=command.host,
        port=command.port,
        coordinators=command.coordinators,
        mdns=command.mdns,
        state=root,
        weights_bytes_max=parse_size_bytes(command.weights_max) if command.weights_max else None,
    )


def _memory_bytes(text: str) -> int:
    size = parse_size_bytes(text)
    if size < MIB:
        raise UsageError(f"--memory {text} is {size} bytes, which holds no layer; did you mean {text.strip()}GiB?")
    return size


def _supervise_all(command: JoinCommand, devices: tuple[Device, ...], root: Path, name: str) -> int:
    """One process for each device, under one machine identity: box/0, box/1."""
    if command.port:
        raise UsageError("--port names one port; several devices need one each, so leave it out")

    codes: list[int] = []

    async def work(stop: asyncio.Event) -> None:
        watching = asyncio.create_task(stop_with_parent(command.exit_with, stop))
        try:
            codes[:] = await asyncio.gather(
                *(
                    supervise(_child(command, device, root / str(index), f"{name}/{index}"), f"{name}/{index}", stop)
                    for index, device in enumerate(devices)
                )
            )
        finally:
            watching.cancel()

    run_until_stopped(work)
    return max(codes, default=0)


def _child(command: JoinCommand, device: Device, state: Path, name: str) -> list[str]:
    arguments = ["join", "--name", name, "--cluster", command.cluster, "--state", str(state)]
    arguments += ["--backend", device.backend.value, "--device", device.device, "--exit-with", str(os.getpid())]
    for option, value in (("--memory", command.memory), ("--reserve", command.reserve), ("--host", command.host)):
        arguments += [option, value] if value else []
    arguments += ["--weights-max", command.weights_max] if command.weights_max else []
    arguments += ["--threads", str(command.threads)] if command.threads else []
    for address in command.coordinators:
        arguments += ["--coordinator", address]
    arguments += [] if command.mdns else ["--no-mdns"]
    arguments += ["--json"] if command.as_json else []
    return potluck_command(*arguments)
