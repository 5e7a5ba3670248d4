"""This package's processes: a bare coordinator in front of stages that compute nothing, each on its own core."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def cores() -> list[int]:
    """The cores that this process may use; empty where processes cannot be pinned."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextlib.contextmanager
def role(module: str, core: int | None, *args: int) -> Iterator[int]:
    """A process of this package on one core; the port that it prints."""
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    command = [*pinned, sys.executable, "-m", f"tests.bench.{module}", *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.strip(), f"{module} did not start"
            yield int(line)
        finally:
            process.kill()


@contextlib.contextmanager
def pinned_here(core: int | None) -> Iterator[None]:
    """This process, which is the client, on one core."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def instant_cluster(*, in_flight: int = 1) -> Iterator[int]:
    """A coordinator alone on its core, before a stage that answers at once; its HTTP port. Stage and client share the
    other core."""
    here: Sequence[int | None] = cores() or [None]
    with (
        role("instant_stage", here[-1]) as stage,
        role("bare_coordinator", here[0], stage, stage, 1, in_flight) as port,
        pinned_here(here[-1]),
    ):
        yield port


@contextlib.contextmanager
def idle_cluster(stages: int) -> Iterator[int]:
    """A coordinator before `stages` nodes' worth of streams, queues and engine threads; its HTTP port. Coordinator and
    client share a core; the stages take turns on all of them, beginning with another one."""
    here: Sequence[int | None] = cores() or [None]
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        for index in reversed(range(stages)):  # each dials the one after it
            core = here[(index + 1) % len(here)]
            ports.insert(0, stack.enter_context(role("idle_stage", core, index, stages, *ports[:1])))
        port = stack.enter_context(role("bare_coordinator", here[0], ports[0], ports[-1], stages, stages))
        stack.enter_context(pinned_here(here[0]))
        yield port


def status(port: int) -> Mapping[str, Any]:
    """What a bare coordinator tells of itself."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/potluck/status", timeout=30) as answer:
        found: Mapping[str, Any] = json.load(answer)
        return found
