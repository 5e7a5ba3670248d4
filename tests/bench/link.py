"""An emulated link between two network namespaces: so much bandwidth, so much delay, some frames late.

Two TAP devices and one process that carries frames between them, in order, as late as the link would. Needs root and
/dev/net/tun; no traffic control of the kernel. Usage of the child: python -m tests.bench.link A B BYTES_S DELAY_S
LATE_SHARE LATE_S.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import secrets
import selectors
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ClusterError
from tests.bench.cores import client_cores, pinned

_HERE, _THERE = "10.79.0.1", "10.79.0.2"
_MTU = 9000
"""Larger than Ethernet's default, so that one process can carry a gigabit."""
_CONGESTION = "/proc/sys/net/ipv4/tcp_congestion_control"
"""Of a namespace, which takes over what this machine was told. Linux and macOS use CUBIC unless told otherwise, which
not every kernel lets a namespace have; Reno waits for losses too. BBR takes late frames for a slow link: 64 MiB over
WIFI took a bare socket 6 to 14 s with it, and 2.4 to 5.6 s with CUBIC."""
_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x0002 | 0x1000


@dataclass(frozen=True, slots=True)
class Link:
    """A kind of network."""

    name: str
    bytes_s: float
    delay_s: float  # one way
    late_share: float = 0.0
    late_s: float = 0.0


CABLE = Link("1 Gbit/s, 0.3 ms", 125e6, 0.0003)
WIFI = Link("Wi-Fi: 300 Mbit/s, 3 ms, one frame in twenty 80 ms late", 37.5e6, 0.003, 0.05, 0.080)


@dataclass(frozen=True, slots=True)
class Joined:
    """The two ends: an address of each, and the words before a command that run it there."""

    here: str
    there: str
    at_here: tuple[str, ...]
    at_there: tuple[str, ...]


def missing() -> str | None:
    """What keeps this machine from emulating a link; None when nothing does."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "an emulated link needs Linux and root"
    if not Path("/dev/net/tun").exists():
        return "an emulated link needs /dev/net/tun"
    return None


@contextlib.contextmanager
def linked(link: Link) -> Iterator[Joined]:
    """Two namespaces with this link between them; removed by name afterwards."""
    prefix = f"pb{secrets.token_hex(3)}"
    spaces = (f"{prefix}-a", f"{prefix}-b")
    try:
        for space in spaces:
            _ip("netns", "add", space)
            _ip("netns", "exec", space, "sh", "-c", f"echo cubic > {_CONGESTION} || echo reno > {_CONGESTION}")
        at_here, at_there = (("ip", "netns", "exec", space) for space in spaces)
        numbers = [str(n) for n in (link.bytes_s, link.delay_s, link.late_share, link.late_s)]
        command = [*at_here, *pinned(client_cores()), sys.executable, "-m", "tests.bench.link", *spaces, *numbers]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as carrier:
            try:
                assert carrier.stdout is not None
                if not carrier.stdout.readline():
                    raise ClusterError("the emulated link did not come up")
                for space, address in zip(spaces, (_HERE, _THERE), strict=True):
                    _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
                    _ip("-n", space, "link", "set", "lo", "up")
                    _ip("-n", space, "link", "set", "eth0", "mtu", str(_MTU), "up")
                yield Joined(_HERE, _THERE, at_here, at_there)
            finally:
                carrier.kill()
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode != 0:
        raise ClusterError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")


# -- The child -------------------------------------------------------------------------------------------


class Direction:
    """Frames on their way to one end. Pure: told when a frame came, it knows when it leaves."""

    def __init__(self, link: Link, seed: int) -> None:
        self._link = link
        self._random = random.Random(seed)
        self._free_s = 0.0  # when the link has sent what it was given
        self._last_s = 0.0
        self._late = self._next_late()
        self._waiting: deque[tuple[float, bytes]] = deque()

    def take(self, frame: bytes, now_s: float) -> None:
        """A late frame holds up those behind it, as on a radio link that delivers in order."""
        self._free_s = max(self._free_s, now_s) + len(frame) / self._link.bytes_s
        late = next(self._late)
        self._last_s = max(self._last_s, self._free_s + self._link.delay_s + (self._link.late_s if late else 0.0))
        self._waiting.append((self._last_s, frame))

    def _next_late(self) -> Iterator[bool]:
        """Whether the next frame is late. Of one frame in twenty, any one of every twenty: at random among all, a run
        of a hundred tokens would meet a third more or fewer of them than the next run."""
        turn = round(1 / self._link.late_share) if self._link.late_share else 0
        while True:
            chosen = self._random.randrange(turn) if turn else None
            yield from (at == chosen for at in range(max(1, turn)))

    def emptied_s(self) -> float:
        """When the latest frame leaves; then none is on its way any more."""
        self._waiting.clear()
        return self._last_s

    @property
    def due_s(self) -> float | None:
        """When the next frame leaves."""
        return self._waiting[0][0] if self._waiting else None

    def due(self, now_s: float) -> Iterator[bytes]:
        while self._waiting and self._waiting[0][0] <= now_s:
            yield self._waiting.popleft()[1]


def main(here: str, there: str, *numbers: str) -> None:
    link = Link("", *map(float, numbers))
    # A wire does not wait for a processor; what else the machine does would count as the link's delay.
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    ends = [_tap(here), _tap(there)]
    sys.stdout.write("up\n")
    sys.stdout.flush()
    towards = {ends[0]: Direction(link, 1), ends[1]: Direction(link, 2)}
    selector = selectors.DefaultSelector()
    for end in ends:
        os.set_blocking(end, False)
        selector.register(end, selectors.EVENT_READ, towards[ends[1] if end == ends[0] else ends[0]])
    while True:
        waits = [due_s for direction in towards.values() if (due_s := direction.due_s) is not None]
        timeout = max(0.0, min(waits) - time.monotonic()) if waits else None
        for key, _ in selector.select(timeout):
            with contextlib.suppress(BlockingIOError):
                while True:
                    key.data.take(os.read(key.fd, _MTU + 64), time.monotonic())
        for end, direction in towards.items():
            for frame in direction.due(time.monotonic()):
                with contextlib.suppress(OSError):  # an end that is going away
                    os.write(end, frame)


def _tap(space: str) -> int:
    """A TAP device of that namespace, called eth0; its frames are read and written here."""
    name = f"tap{secrets.token_hex(3)}"
    file = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _TAP_WITHOUT_HEADER))
    _ip("link", "set", name, "netns", space, "name", "eth0")
    return file


if __name__ == "__main__":
    main(*sys.argv[1:])
