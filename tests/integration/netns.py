"""A LAN in a box: machines as network namespaces on a bridge that lives in a namespace of its own.

Everything is made in `lan()` under a prefix unique to the run, and removed there by name, processes by their ids.
Needs root and a kernel with namespaces, veth and bridges; `missing()` probes and says what is not there. A machine
here has its own network, and on request its own machine id and empty folders; the rest it shares with the host.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_SUBNET, _SUBNET6 = "10.77.0", "fd77::"
_TOOLS = ("ip", "nsenter", "unshare", "mount")


@functools.cache
def missing() -> str | None:
    """What keeps this machine from holding a LAN; None when nothing does."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's; this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        return f"missing commands: {', '.join(absent)} (iproute2, util-linux)"
    try:
        with lan("a") as box:
            box.popen("a", ["true"], hidden=[Path(tempfile.gettempdir())]).wait(timeout=10)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"this kernel or container refuses a LAN in a box: {error}"
    return None


def require_lan() -> None:
    """Skip the calling test, with the reason, where no LAN can be built."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


class Lan:
    """Machines by name. Made by `lan()`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.name = self._prefix = f"pl{secrets.token_hex(3)}"
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        self._processes: list[subprocess.Popen[Any]] = []
        self._files = contextlib.ExitStack()

    def address(self, name: str) -> str:
        """The machine's IPv4 address."""
        return f"{_SUBNET}.{self._numbers[name]}"

    def address6(self, name: str) -> str:
        """The machine's unique local IPv6 address."""
        return f"{_SUBNET6}{self._numbers[name]:x}"

    def popen(
        self,
        name: str,
        command: Sequence[str],
        *,
        hidden: Sequence[Path] = (),
        machine_id: str | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Run a command on a machine; the process's id is the command's own. `hidden` folders are empty there,
        and writable; `machine_id` is what /etc/machine-id says there."""
        process = subprocess.Popen(
            [*self.prefix(name, hidden=hidden, machine_id=machine_id), *command],
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            **{"cwd": ROOT, **options},
        )
        self._processes.append(process)
        return process

    def prefix(self, name: str, *, hidden: Sequence[Path] = (), machine_id: str | None = None) -> list[str]:
        """The words before a command that make it run on a machine, for who starts processes otherwise."""
        script = ["set -e"]
        script += [f"mount -t tmpfs potluck '{folder}'" for folder in hidden]
        if machine_id is not None:
            file = self._files.enter_context(tempfile.NamedTemporaryFile("w", prefix=self._prefix))  # noqa: SIM115
            file.write(f"{machine_id}\n")
            file.flush()
            script.append(f"mount --bind '{file.name}' /etc/machine-id")
        script.append('exec "$@"')
        namespace = f"--net=/run/netns/{self._namespace(name)}"
        private = ["unshare", "--mount", "--propagation", "private"]
        return ["nsenter", namespace, *private, "sh", "-c", "\n".join(script), "sh"]

    def set_multicast(self, *, carried: bool) -> None:
        """Whether the switch carries multicast between machines, as some access points do not."""
        for number in self._numbers.values():
            _ip("-n", self._switch, "link", "set", f"p{number}", "type", "bridge_slave",
                "mcast_flood", "on" if carried else "off")  # fmt: skip

    def set_rate(self, name: str, mbit_s: int | None) -> None:
        """How fast the machine can send; None for as fast as the processor lets it."""
        tc = ["netns", "exec", self._namespace(name), "tc", "qdisc"]
        if mbit_s is None:
            _ip(*tc, "delete", "dev", "eth0", "root")
        else:
            burst = f"{max(64, mbit_s // 2)}kb"  # four milliseconds: on a busy machine the kernel looks no more often
            shaper = ["tbf", "rate", f"{mbit_s}mbit", "burst", burst, "latency", "50ms"]
            _ip(*tc, "replace", "dev", "eth0", "root", *shaper)

    def sent_bytes(self, name: str) -> int:
        """What the machine has put on its cable so far, frames and all."""
        [link] = json.loads(_ip("-n", self._namespace(name), "-statistics", "-json", "link", "show", "eth0"))
        return int(link["stats64"]["tx"]["bytes"])

    def set_link(self, name: str, *, up: bool) -> None:
        """Pull the machine's cable, or plug it in again. The address survives."""
        _ip("-n", self._switch, "link", "set", f"p{self._numbers[name]}", "up" if up else "down")

    def create(self) -> None:
        """Lay the cables. `remove()` undoes whatever of it succeeded."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for name, number in self._numbers.items():
            namespace, port = self._namespace(name), f"p{number}"
            _ip("netns", "add", namespace)
            _ip("link", "add", "eth0", "netns", namespace, "type", "veth", "peer", port, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", namespace, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "address", "add", f"{self.address6(name)}/64", "dev", "eth0", "nodad")

    def remove(self) -> None:
        """Stop what we started, then remove what we made. Cables go with their namespaces."""
        for process in self._processes:
            _stop(process)
        for namespace in (*map(self._namespace, self._numbers), self._switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        self._files.close()

    @property
    def _switch(self) -> str:
        return f"{self._prefix}-switch"

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"


@contextlib.contextmanager
def lan(*names: str) -> Iterator[Lan]:
    """Machines on one switch for the length of a block."""
    box = Lan(names)
    try:
        box.create()
        yield box
    finally:
        box.remove()


def _ip(*arguments: str) -> str:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"`ip {' '.join(arguments)}` failed: {result.stderr.strip()}")
    return result.stdout


def _stop(process: subprocess.Popen[Any]) -> None:
    with process:  # closes its pipes
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
