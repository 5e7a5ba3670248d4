"""HOST:PORT as people write it."""

from __future__ import annotations

import ipaddress

from cluster.errors import UsageError


def split_host_port(text: str) -> tuple[str, int]:
    """`10.0.0.5:7433` or `[fd00::5]:7433` in its parts; UsageError for anything else."""
    if "://" in text:
        raise UsageError(f"expected HOST:PORT such as 192.168.1.20:7433, without http:// or a path; found {text!r}")
    host, colon, port = text.strip().rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"expected HOST:PORT such as 192.168.1.20:7433, found {text!r}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise UsageError(f"an IPv6 address needs brackets, such as [fd00::5]:7433; found {text!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether `host` only ever means the machine that dials it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
