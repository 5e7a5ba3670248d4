"""llama.cpp's arms: workers over RPC as nodes, and one process with the cores of both or of one."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import IO

from cluster.errors import ClusterError
from tests.bench.arms import START_S, Arm, asked
from tests.bench.bench import LLAMA, LLAMA_ONE, RPC
from tests.bench.cores import client_cores, node_core, pinned
from tests.bench.model import Form
from tests.bench.peers.build import SERVER, WORKER, program
from tests.bench.peers.gguf import gguf_file

_SLOTS, _CONTEXT = 32, 8192
"""A slot for each of the most users; all share the context, which holds them or the longest prompt that it is asked."""


@contextlib.contextmanager
def llama_arms(form: Form) -> Iterator[dict[str, Arm]]:
    """All of them, each warmed up."""
    with contextlib.ExitStack() as stack:
        one, two = node_core(0), node_core(1)
        workers = [stack.enter_context(_worker(core)) for core in (one, two)]
        shared = ("--rpc", ",".join(workers), "--tensor-split", "1,1", "--threads", "1")
        yield {
            name: stack.enter_context(_server(name, form, cores, options))
            for name, cores, options in (
                (RPC, client_cores(), shared),
                (LLAMA, (one, two), ("--threads", "2")),
                (LLAMA_ONE, (one,), ("--threads", "1")),
            )
        }


@contextlib.contextmanager
def _worker(core: int) -> Iterator[str]:
    """One node's worth of RPC; its address."""
    port = _free_port()
    command = [*pinned([core]), str(program(WORKER)), "--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
    with _running(command) as (child, said):
        deadline = time.monotonic() + START_S
        while not _listens(port):
            _check(child, said, deadline)
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def _server(name: str, form: Form, cores: Sequence[int], options: Sequence[str]) -> Iterator[Arm]:
    port = _free_port()
    command = [*pinned(cores), str(program(SERVER)), "--model", str(gguf_file(form)), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--parallel", str(_SLOTS), "--ctx-size", str(_CONTEXT), "--kv-unified"]
    command += ["--gpu-layers", "99", "--cache-ram", "0", "--no-ui", *options]
    url = f"http://127.0.0.1:{port}"
    with _running(command) as (child, said):
        deadline = time.monotonic() + START_S
        while not _is_ready(url):
            _check(child, said, deadline)
            time.sleep(0.5)
        yield asked(name, url)


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """What it says goes to a file, of which nobody has to read before it fails."""
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=said, stderr=said) as child:
        try:
            yield child, said
        finally:
            child.kill()


def _check(child: subprocess.Popen[bytes], said: IO[bytes], deadline: float) -> None:
    if child.poll() is None and time.monotonic() < deadline:
        return
    said.seek(0)
    tail = said.read()[-800:].decode(errors="replace")
    raise ClusterError(f"{child.args!r} did not come up (exit code {child.poll()}). It said:\n{tail}")


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
