"""This package's processes: a bare coordinator in front of stages that compute nothing, each on its own core."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil


def cores() -> list[int]:
    """The cores that this process may use; empty where processes cannot be pinned."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@dataclass(frozen=True, slots=True)
class Role:
    """A process of this package."""

    port: int
    pid: int

    @property
    def cpu_s(self) -> float:
        """Its processor time so far, all threads."""
        used = psutil.Process(self.pid).cpu_times()
        return used.user + used.system


@dataclass(frozen=True, slots=True)
class Cluster:
    """A coordinator, which says over HTTP how it is, and its stages."""

    coordinator: Role
    stages: tuple[Role, ...]

    def status(self) -> Mapping[str, Any]:
        url = f"http://127.0.0.1:{self.coordinator.port}/potluck/status"
        with urllib.request.urlopen(url, timeout=30) as answer:
            found: Mapping[str, Any] = json.load(answer)
            return found


@contextlib.contextmanager
def role(module: str, core: int | None, *args: int) -> Iterator[Role]:
    """A process of this package on one core, from when it has printed its port."""
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    command = [*pinned, sys.executable, "-m", f"tests.bench.{module}", *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.strip(), f"{module} did not start"
            yield Role(int(line), process.pid)
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
def instant_cluster(*, in_flight: int = 1) -> Iterator[Cluster]:
    """A coordinator alone on its core, before a stage that answers at once. Stage and client share the
    other core."""
    here: Sequence[int | None] = cores() or [None]
    with (
        role("instant_stage", here[-1]) as stage,
        role("bare_coordinator", here[0], stage.port, stage.port, 1, in_flight) as coordinator,
        pinned_here(here[-1]),
    ):
        yield Cluster(coordinator, (stage,))


@contextlib.contextmanager
def idle_cluster(stages: int) -> Iterator[Cluster]:
    """A coordinator before `stages` nodes' worth of streams, queues and engine threads. Coordinator and client share a
    core; the stages take turns on all of them, beginning with another one."""
    here: Sequence[int | None] = cores() or [None]
    with contextlib.ExitStack() as stack:
        started: list[Role] = []
        for index in reversed(range(stages)):  # each dials the one after it
            following = [next_one.port for next_one in started[:1]]
            stage = role("idle_stage", here[(index + 1) % len(here)], index, stages, *following)
            started.insert(0, stack.enter_context(stage))
        ends = started[0].port, started[-1].port
        coordinator = stack.enter_context(role("bare_coordinator", here[0], *ends, stages, stages))
        stack.enter_context(pinned_here(here[0]))
        yield Cluster(coordinator, tuple(started))
