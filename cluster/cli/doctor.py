"""`potluck doctor`: gather what the checks need to know, run them, show the verdicts.

A check that breaks is a finding of its own and hides none of the others.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from cluster.cli import doctor_machine as machine_checks
from cluster.cli import doctor_network as network
from cluster.cli import doctor_software as software
from cluster.cli.check import Check, Status
from cluster.discovery import multicast_works
from cluster.errors import UsageError
from cluster.interfaces import choose_interfaces, read_interfaces
from cluster.state_dir import default_state_path
from cluster.types import Backend
from node.hardware import detect_devices, engine_version, measure_memory, read_machine
from node.memory_cuda import read_driver

_HOME: Final = Path(__file__).resolve().parents[2]
_TORCH_TIMEOUT_S: Final = 60.0
_MARKS: Final = {Status.OK: ("✓", "green"), Status.WARN: ("!", "yellow"), Status.FAIL: ("✗", "red")}

_ASK_TORCH: Final = (
    "import torch, json; print(json.dumps([torch.__version__, torch.version.cuda or getattr(torch.version, 'hip', None)"
    " or '', torch.cuda.is_available()]))"
)


def doctor(json_output: bool, state: Path | None) -> int:
    """Examine this machine. Exit code 1 when something fails, 0 otherwise."""
    folder = (state or default_state_path()).expanduser()
    checks = []
    console = Console(highlight=False, soft_wrap=True)
    for check in _examine(folder):
        checks.append(check)
        if not json_output:
            _show(console, check)
    failed = [check for check in checks if check.status is Status.FAIL]
    if json_output:
        found = [{"name": c.name, "status": c.status.value, "found": c.found, "do": c.do} for c in checks]
        sys.stdout.write(json.dumps({"ok": not failed, "checks": found}, indent=2, ensure_ascii=False) + "\n")
    else:
        names = ", ".join(check.name for check in failed)
        console.print(f"\nfailed: {names}" if failed else "\nnothing here keeps Potluck from working", markup=False)
    return 1 if failed else 0


def _examine(state: Path) -> Iterator[Check]:
    groups: tuple[tuple[str, Callable[[], list[Check]]], ...] = (
        ("software", _software),
        ("memory", _memory),
        ("state", lambda: _state(state)),
        ("network", _network),
        ("local network", _local_network),
    )
    for name, group in groups:
        try:
            yield from group()
        except Exception as error:  # noqa: BLE001 - the boundary of one group: the others must still be heard
            yield Check(
                name, Status.FAIL, f"this check broke: {type(error).__name__}: {error}", "report it, with this line"
            )


def _software() -> list[Check]:
    machine = read_machine()
    installed = {
        software.canonical(d.metadata["Name"]): d.version
        for d in importlib.metadata.distributions()
        if d.metadata["Name"]
    }
    system = platform.system()
    mlx_halves = {name: version for name, version in installed.items() if name.startswith(("mlx-cpu", "mlx-cuda"))}
    pair = software.check_mlx_pair(installed.get("mlx"), mlx_halves, system)
    torch = _ask_torch() if machine.gpus and Backend.TORCH in machine.engines else None
    return [
        software.check_python(sys.version_info[:3]),
        software.check_packages(_requirements(), installed, system),
        software.check_foreign(
            {name: _location(name) for name in software.OUR_PACKAGES},
            _HOME,
            importlib.metadata.packages_distributions(),
        ),
        software.check_engines(machine, {backend: engine_version(backend) for backend in Backend}),
        *([pair] if pair else []),
        software.check_gpu(read_driver(), machine, torch),
    ]


def _memory() -> list[Check]:
    try:
        devices = detect_devices()
    except UsageError:  # no engine: said already
        return []
    return [machine_checks.check_memory(f"memory ({device.device})", measure_memory(device)) for device in devices]


def _state(folder: Path) -> list[Check]:
    return [
        machine_checks.check_state(folder, machine_checks.find_holders(folder)),
        machine_checks.check_disk(folder),
    ]


def _network() -> list[Check]:
    table = read_interfaces()
    chosen = choose_interfaces(table)
    ports = (("port of the endpoint", "127.0.0.1", network.HTTP_PORT, "--port"),
             ("port for nodes", "", network.CLUSTER_PORT, "--cluster-port"))  # fmt: skip
    return [
        *(
            network.check_port(
                name, port, free=(free := network.port_is_free(host, port)),
                owner=None if free else network.port_owner(port), option=option,
            )
            for name, host, port, option in ports
        ),
        network.check_interfaces(table),
        network.check_multicast(chosen, works=asyncio.run(multicast_works(chosen))),
        network.check_firewall(network.active_firewalls()),
        *([network.check_congestion(algorithm)] if (algorithm := network.congestion_algorithm()) else []),
    ]  # fmt: skip


def _local_network() -> list[Check]:
    if platform.system() != "Darwin":
        return []
    gateway = network.default_gateway()
    peers = network.known_peers(gateway)
    return [network.check_local_network(gateway, network.ping, peers, network.connect_errno)]


def _requirements() -> list[str] | None:
    try:
        return importlib.metadata.requires("potluck") or []
    except importlib.metadata.PackageNotFoundError:
        return None


def _location(name: str) -> Path | None:
    """Where Python would import a package from, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin else None


def _ask_torch() -> software.TorchProbe:
    """In a process of its own: a broken driver can take the asking process down."""
    command = [sys.executable, "-c", _ASK_TORCH]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return software.TorchProbe("", "", False, f"it does not answer within {_TORCH_TIMEOUT_S:.0f} s")
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return software.TorchProbe("", "", False, last)
    version, built_for, sees_gpu = json.loads(result.stdout)
    return software.TorchProbe(version, built_for, sees_gpu, "")


def _show(console: Console, check: Check) -> None:
    """One line each, plus what to do. Without a terminal the verdict is a word, for logs and grep."""
    mark, style = _MARKS[check.status]
    verdict = f"{mark} " if console.is_terminal else f"{check.status.value:<5}"
    console.print(Text.assemble((verdict, style), f"{check.name}: {check.found}"))
    if check.do and check.status is not Status.OK:
        console.print(Text(f"  → {check.do}" if console.is_terminal else f"     do: {check.do}"))
