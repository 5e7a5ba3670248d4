"""Real clusters for tests: `potluck serve` and `potluck join` as processes of their own, on loopback.

Every cluster has a name of its own, every process a state folder below the test's; what is started in a `with`
block has ended after it, by process id. Nodes cost seconds to start (they import their engine), coordinators
hardly any: a Pool keeps nodes, and one coordinator after the other takes those it needs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from cluster.cli.child import Process, running

START_S = 90.0
"""Several processes importing torch on two cores that are busy with other things; far beyond it something is wrong."""

SOON_S = 20.0
"""For what takes a second or two on an idle machine."""

CONTEXT, USERS = 1024, 16
"""What the tests' coordinators promise: more than any answer here needs."""


def has_backend(backend: str) -> bool:
    """Whether this installation has the engine."""
    return importlib.util.find_spec({"torch": "torch", "mlx": "mlx_lm"}[backend]) is not None


def new_cluster() -> str:
    """A name that no other cluster on this network has."""
    return f"test-{secrets.token_hex(4)}"


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = SOON_S) -> Any:
    """The condition's value as soon as it is true."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)


def processes_of(cluster: str) -> list[psutil.Process]:
    """Every process that was started for this cluster and still runs, whoever its parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if cluster in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def happenings(process: Process, event: str) -> list[Mapping[str, Any]]:
    """Everything of one kind that a process has reported so far."""
    lines = (line for line in process.output().splitlines() if line.startswith('{"event"'))
    return [said for said in map(json.loads, lines) if said["event"] == event]


# -- Coordinators ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coordinator:
    """A running `potluck serve`."""

    process: Process
    cluster: str
    url: str
    port: int  # for `join --coordinator`

    def wait_ready(self, timeout_s: float = START_S) -> Coordinator:
        self.process.wait_for("ready", timeout_s)
        return self

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60.0)

    def status(self) -> Any:
        return self.get("/potluck/status").json()

    def is_free(self) -> bool:
        """Nobody has room in the caches, and every stage holds what is retained and nothing else."""
        status = self.status()
        load, used = status["load"], {node["kv_tokens_used"] for node in status["nodes"] if node["stage"] is not None}
        nobody = (load["waiting"], load["running"], load["kv_tokens_reserved"]) == (0, 0, 0)
        return nobody and used == {load["prefix_cache"]["retained_tokens"]}

    def post(self, path: str, body: Mapping[str, object]) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120.0)

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client; close it, or use it in a `with`."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120.0, **options)

    def complete(self, prompt: Sequence[int], **fields: object) -> Any:
        """The choice that continues these token ids, with its `token_ids`."""
        body = {"prompt": list(prompt), "return_token_ids": True, "ignore_eos": True, "temperature": 0, **fields}
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def is_unharmed(self, prompt: Sequence[int], expected: Sequence[int]) -> bool:
        """Whether it still answers, and rightly."""
        return bool(self.complete(prompt, max_tokens=len(expected))["token_ids"] == list(expected))


class Bystander:
    """Somebody who asks the same question again and again while a test does something else to the cluster."""

    def __init__(self, coordinator: Coordinator, prompt: Sequence[int], expected: Sequence[int]) -> None:
        self._ask: Callable[[], bool] = lambda: coordinator.is_unharmed(prompt, expected)
        self._over = threading.Event()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> None:
        self._asking = self._thread.submit(self._keep_asking)

    def _keep_asking(self) -> None:
        while True:
            assert self._ask(), "somebody else's answer was wrong meanwhile"
            if self._over.wait(0.1):
                return

    def __exit__(self, *_: object) -> None:
        self._over.set()
        try:
            self._asking.result(120)
        finally:
            self._thread.shutdown()


@contextlib.contextmanager
def serving(
    model: Path | str,
    cluster: str,
    state: Path,
    *options: str,
    context: int = CONTEXT,
    users: int = USERS,
    cluster_host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Coordinator]:
    """`potluck serve MODEL` without a node of its own, unless `options` say otherwise; it listens, no more."""
    arguments = ["serve", str(model), "--cluster", cluster, "--state", str(state), "--port", "0"]
    arguments += ["--context", str(context), "--users", str(users), "--cluster-port", "0"]
    arguments += ["--cluster-host", cluster_host] if cluster_host else []
    with running("coordinator", [*arguments, *options], prefix=prefix, env=env) as process:
        url = str(process.wait_for("starting", START_S)["url"])
        port = int(process.wait_for("listening", START_S)["port"])
        yield Coordinator(process, cluster, url, port)


# -- Nodes -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(
    name: str,
    backend: str,
    cluster: str,
    state: Path,
    *options: str,
    memory: str = "512MiB",
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """`potluck join`, started but perhaps not up yet: wait for its `up`."""
    arguments = ["join", "--name", name, "--cluster", cluster, "--backend", backend, "--device", "cpu"]
    arguments += ["--memory", memory, "--threads", "1", "--state", str(state)]
    arguments += ["--host", host] if host else []
    with running(f"node {name}", [*arguments, *options], prefix=prefix, env=env) as process:
        yield process


NODES = tuple(f"{backend}-{letter}" for backend in ("torch", "mlx") for letter in "abcd")


@dataclass(slots=True)
class Pool:
    """Nodes of one cluster that outlive coordinators. A node starts when it is first needed."""

    folder: Path
    mdns: bool
    stack: contextlib.ExitStack
    cluster: str = field(default_factory=new_cluster)
    processes: dict[str, Process] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    def need(self, *names: str) -> None:
        """Have these nodes up."""
        fresh = [name for name in names if name not in self.processes]
        for name in fresh:
            state = self.folder / name
            options = () if self.mdns else ("--no-mdns",)
            self.processes[name] = self.stack.enter_context(
                joined(name, name.partition("-")[0], self.cluster, state, *options)
            )
        for name in fresh:
            up = self.processes[name].wait_for("up", START_S)
            self.addresses[name], self.ids[name] = str(up["addresses"][0]), str(up["id"])
        for name in names:
            process = self.processes[name]
            assert process.exit_code is None, f"{name} has died. It said:\n{process.output()}"

    @contextlib.contextmanager
    def serving(self, model: Path, names: Sequence[str], *options: str, **settings: Any) -> Iterator[Coordinator]:
        """A coordinator that serves `model` with a stage on each of these nodes and no other."""
        self.need(*names)
        others = [word for name in NODES if name not in names for word in ("--exclude", name)]
        peers = [] if self.mdns else [word for name in names for word in ("--peer", self.addresses[name])]
        found = peers + ([] if self.mdns else ["--no-mdns"])
        state = self.folder / f"coordinator-{secrets.token_hex(3)}"
        wanted = ["--no-local-node", "--min-nodes", str(len(names))]
        with serving(model, self.cluster, state, *wanted, *others, *found, *options, **settings) as coordinator:
            yield coordinator.wait_ready()
