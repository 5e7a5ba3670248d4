"""What the table was measured on: commit, hardware, versions, and what else the machine was doing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

import psutil

from cluster.quantities import format_bytes
from tests.bench.peers.build import VERSION

_PACKAGES = ("torch", "mlx", "transformers", "numpy", "grpcio", "uvicorn", "uvloop")
_ROOT = Path(__file__).parents[2]
_SAMPLE_S = 5.0


def now() -> str:
    """As runs are dated."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def machine(*, peers: bool, engine: str, client_cores: str) -> Mapping[str, str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES if _installed(name))
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": format_bytes(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": versions + (f"; llama.cpp of llama-cpp-python {VERSION}" if peers else ""),
        "the nodes' engine": engine,
        "cores of coordinators and client": client_cores,
    }


def commit() -> str:
    """What is measured. The page and its record do not count: a run before this one may have written them."""
    name = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/benchmarks.*")
    return f"{name}-dirty" if changed else name or "unknown"


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


class Beside:
    """Samples how busy the processors are with processes that the benchmark did not start."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._shares: list[float] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def forget(self) -> None:
        """What was seen until now does not count any more."""
        self._shares = []

    def told(self) -> str:
        if not self._shares:
            return "not watched"
        return (
            f"other processes took {fmean(self._shares):.2f} cores on average, {max(self._shares):.2f} at most "
            f"(of {os.cpu_count()}, sampled every {_SAMPLE_S:.0f} s)"
        )

    def _watch(self) -> None:
        before_s, before_own_s = _busy_s(), _own_s()
        while not self._over.wait(_SAMPLE_S):
            now_s, now_own_s = _busy_s(), _own_s()
            # Children that ended between two samples take what they used with them: never less than nothing.
            self._shares.append(max(0.0, (now_s - before_s) - max(0.0, now_own_s - before_own_s)) / _SAMPLE_S)
            before_s, before_own_s = now_s, now_own_s


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


def _own_s() -> float:
    """Processor time of this process and all its descendants that live, and of those that it has waited for."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
