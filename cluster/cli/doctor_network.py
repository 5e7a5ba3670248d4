"""Doctor's checks of the network: ports, interfaces, multicast, macOS's Local Network permission, firewalls, pacing.

Verdicts are functions of facts; what has to be asked of the system is at the bottom.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import psutil

from cluster.cli.check import Check, Status
from cluster.interfaces import Interface, best_addresses, choose_interfaces, skip_reason

HTTP_PORT: Final = 8000
CLUSTER_PORT: Final = 7433
"""The defaults of `potluck serve`; the second is for machines that mDNS does not reach."""

_PEERS_TRIED_MAX: Final = 3
_OPEN: Final = "allow UDP 5353 (mDNS) and Potluck's TCP ports; `potluck join --port N` makes a node's port a fixed one"


def check_port(name: str, port: int, *, free: bool, owner: str | None, option: str) -> Check:
    """Whether `potluck serve` can have one of its ports."""
    if free:
        return Check(name, Status.OK, f"{port} is free")
    by = f" by {owner}" if owner else ""
    return Check(name, Status.WARN, f"{port} is in use{by}", f"if that is not Potluck itself, pass {option}")


def check_interfaces(table: Sequence[Interface]) -> Check:
    """Which interfaces nodes are found through."""
    chosen = choose_interfaces(table)
    found = "; ".join(f"{i.name} {', '.join(best_addresses([i]))}" for i in chosen) or "none"
    skipped = [f"{i.name}: {reason}" for i in table if (reason := skip_reason(i)) and i.is_up and not i.is_loopback]
    if skipped:
        found += f" (not used: {'; '.join(skipped)})"
    if not chosen or all(interface.is_loopback for interface in chosen):
        return Check("interfaces", Status.WARN, found, "connect this machine to the network of the others")
    return Check("interfaces", Status.OK, found)


def check_multicast(interfaces: Sequence[Interface], *, works: bool) -> Check:
    """Whether advertisements come back to this machine."""
    if not interfaces:
        return Check(
            "multicast", Status.FAIL, "there is no interface to try it on", "connect this machine to a network"
        )
    names = ", ".join(interface.name for interface in interfaces)
    if works:
        return Check(
            "multicast", Status.OK, f"mDNS is heard on {names} by this machine; access points may still drop it"
        )
    return Check(
        "multicast",
        Status.FAIL,
        f"mDNS is not heard on {names}",
        f"{_OPEN}. Or do without: `potluck join --coordinator HOST:PORT --no-mdns`, `potluck serve --peer HOST:PORT`",
    )


def check_local_network(
    gateway: str | None, ping: Callable[[str], bool], peers: Sequence[str], connect: Callable[[str], int]
) -> Check:
    """macOS denies programs the local network one by one, and does not say so: the gateway answers, since `ping`
    is Apple's own, while connecting to a machine of the same subnet fails at once with "no route to host"."""
    name = "local network"
    if gateway is None or not ping(gateway):
        return Check(
            name, Status.WARN, "the gateway does not answer; nothing to compare with", "check the network cable"
        )
    tried = {peer: connect(peer) for peer in peers[:_PEERS_TRIED_MAX] if peer != gateway}
    if not tried:
        return Check(name, Status.OK, "the gateway answers; no other machine is known here to try")
    denied = [peer for peer, code in tried.items() if code == errno.EHOSTUNREACH]
    if len(denied) < len(tried):
        return Check(name, Status.OK, "the gateway and a machine of this subnet can be reached")
    return Check(
        name,
        Status.FAIL,
        f'the gateway {gateway} answers, but {", ".join(denied)} gives "no route to host": macOS denies it',
        "System Settings > Privacy & Security > Local Network: switch your terminal (or Python) on and restart it",
    )


def check_firewall(active: Sequence[str]) -> Check:
    """Firewalls that are switched on. Their rules cannot be read without root, so this only points there."""
    if not active:
        return Check("firewall", Status.OK, "none seen")
    return Check("firewall", Status.WARN, f"{', '.join(active)} is on", f"where machines are not found: {_OPEN}")


def check_congestion(algorithm: str) -> Check:
    """How TCP paces what this machine sends to the others. BBR takes frames that come late, as on Wi-Fi, for a slow
    link: measured over an emulated one, 64 MiB took two to three times as long as with CUBIC."""
    name = "tcp pacing"
    if not algorithm.startswith("bbr"):
        return Check(name, Status.OK, algorithm)
    return Check(
        name,
        Status.WARN,
        f"{algorithm}, which may send slowly where frames come late, as on Wi-Fi",
        "where machines are on Wi-Fi, `sudo sysctl -w net.ipv4.tcp_congestion_control=cubic`, then start Potluck again",
    )


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def port_owner(port: int) -> str | None:
    """The process that listens on a port, where the system lets us know."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr or not connection.pid:
                continue
            if connection.laddr.port == port:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:  # macOS shows other processes' connections to root alone
        return None
    return None


def active_firewalls(root: Path = Path("/")) -> list[str]:
    """ufw, firewalld and macOS's application firewall."""
    found = []
    with contextlib.suppress(OSError):
        if re.search(r"^ENABLED=yes$", (root / "etc/ufw/ufw.conf").read_text(), re.MULTILINE):
            found.append("ufw")
    if (root / "run/firewalld").exists():
        found.append("firewalld")
    tool = root / "usr/libexec/ApplicationFirewall/socketfilterfw"
    if tool.exists() and "enabled" in _output([str(tool), "--getglobalstate"]):
        found.append("the macOS firewall")
    return found


def congestion_algorithm(root: Path = Path("/")) -> str | None:
    """What connections of this process begin with; None where the system is not Linux, or does not say."""
    try:
        return (root / "proc/sys/net/ipv4/tcp_congestion_control").read_text().strip() or None
    except OSError:
        return None


def default_gateway() -> str | None:
    """macOS's default router."""
    match = re.search(r"gateway: (\S+)", _output(["/sbin/route", "-n", "get", "default"]))
    return match[1] if match else None


def ping(host: str) -> bool:
    """One echo, one second."""
    try:
        command = ["/sbin/ping", "-c", "1", "-t", "1", host]
        return subprocess.run(command, capture_output=True, timeout=5, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def known_peers(gateway: str | None, arp_table: str | None = None) -> list[str]:
    """Machines of this subnet that macOS has talked to lately, from `arp -an`."""
    table = _output(["/usr/sbin/arp", "-an"]) if arp_table is None else arp_table
    # ? (192.168.1.20) at a4:83:e7:1:2:3 on en0 ifscope [ethernet]
    entries = re.findall(r"\((\d+\.\d+\.\d+\.\d+)\) at ([0-9a-f:]+) on (en\d+)(?!.*permanent)", table)
    return [host for host, link, _ in entries if host != gateway and link != "ff:ff:ff:ff:ff:ff" and host[:4] != "224."]


def connect_errno(host: str) -> int:
    """The error of connecting to a port where hardly anything listens; 0 for none. "Refused" is an answer too."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        try:
            return probe.connect_ex((host, CLUSTER_PORT))
        except TimeoutError:
            return errno.ETIMEDOUT


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
