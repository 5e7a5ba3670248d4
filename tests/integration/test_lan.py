"""A LAN in a box: the whole product on machines with networks and disks of their own, joined by a switch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the checkpoint is made with transformers: the extra [torch]")

from cluster.cli.child import Process
from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.types import LayerRange
from tests.checkpoints import make_checkpoint
from tests.integration.answers import GREEDY, Question, question
from tests.integration.live import (
    START_S,
    Coordinator,
    eventually,
    happenings,
    has_backend,
    joined,
    new_cluster,
    processes_of,
    serving,
)
from tests.integration.mounts import hiding
from tests.integration.netns import Lan, lan, require_lan
from tests.oracle.reference import WholeModel

pytestmark = pytest.mark.root

OTHER = "mlx" if has_backend("mlx") else "torch"
LAYERS = 6

_UNDER_WAY_BYTES = 8 * 1024 * 1024
"""What may be lost with a connection: pieces of 1 MiB of four runs, and what gRPC and the kernel hold of each."""

_LONG, _PULLED_S = 400, 8.0
"""Tokens of an answer that is under way when a cable is pulled; and for how long, which is noticed after three."""

_ASK = """
import json, sys, time, urllib.error, urllib.request
began = time.monotonic()
try:
    body = sys.argv[2].encode() if len(sys.argv) > 2 else None
    request = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
    for line in urllib.request.urlopen(request, timeout=60):
        print(line.decode().rstrip(), flush=True)
except urllib.error.HTTPError as error:
    print(error.read().decode())
"""


@dataclass(frozen=True, slots=True)
class Model:
    """Large enough that five percent of a slice are more than its names."""

    folder: Path
    asked: Question

    def slice_bytes(self, stage: Mapping[str, Any]) -> int:
        layers = LayerRange(stage["layers"]["first"], stage["layers"]["last"])
        owned = owned_tensors(open_checkpoint(self.folder), layers, LAYERS)
        return sum(tensor.end - tensor.begin for tensor in owned)

    def body(self, **fields: object) -> dict[str, object]:
        how = {"max_tokens": len(self.asked.ids), "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {"prompt": list(self.asked.prompt), **how, **fields}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 32}
    folder = make_checkpoint("qwen3", tmp_path_factory.mktemp("lan-model"), layers=LAYERS, **sizes)
    return Model(folder, question(WholeModel(folder), 30, GREEDY))


@pytest.fixture(scope="module")
def box() -> Iterator[Lan]:
    require_lan()
    with lan("desk", "mini", "studio") as made:
        yield made


def _command(box: Lan, machine: str, url: str, body: Mapping[str, object] | None = None) -> list[str]:
    """A client on that machine."""
    return [*box.prefix(machine), sys.executable, "-c", _ASK, url, *([] if body is None else [json.dumps(body)])]


def _ask(box: Lan, machine: str, url: str, body: Mapping[str, object] | None = None) -> Any:
    done = subprocess.run(_command(box, machine, url, body), capture_output=True, text=True, timeout=90, check=True)
    return json.loads(done.stdout)


def _received_bytes(coordinator: Process, node: str) -> int:
    reports = [said["report"] for said in happenings(coordinator, "loading") if said["node"] == node]
    return max(report["received_bytes"] for report in reports)


def _held_bytes(box: Lan, url: str) -> dict[str, int]:
    """By machine; the node beside the coordinator uses the model's own folder."""
    nodes = _ask(box, "desk", f"{url}/potluck/status")["nodes"]
    return {"mini" if node["name"] == "mini" else "desk": node["weights"]["held_bytes"] for node in nodes}


def _assert_little_received(coordinator: Process, model: Model, *, strangers: set[str]) -> None:
    """Nodes on machines that have never seen the model received their slices and little more; others no tensor."""
    plan = happenings(coordinator, "planned")[-1]
    names = {node["id"]: node["name"] for node in plan["nodes"]}
    for stage in plan["plan"]["stages"]:
        name = names[stage["members"][0]]
        received, owned = _received_bytes(coordinator, name), model.slice_bytes(stage)
        if name in strangers:
            assert owned <= received <= owned * 1.05, f"{name} owns {owned} bytes and received {received}"
        else:
            assert received <= owned * 0.05, f"{name} sees the files and received {received} bytes"


def test_serve_here_and_join_there_is_all_it_takes(box: Lan, model: Model, tmp_path: Path) -> None:
    """The node beside the coordinator and one found over multicast, whose disk is empty, answer together."""
    cluster = new_cluster()
    desk = box.prefix("desk", machine_id="a" * 32)
    mini = box.prefix("mini", machine_id="b" * 32, hidden=[model.folder])
    with (
        serving(model.folder, cluster, tmp_path / "desk", "--min-nodes", "2", cluster_host="", prefix=desk) as serve,
        joined("mini", OTHER, cluster, tmp_path / "mini", host="", prefix=mini) as join,
    ):
        up = join.wait_for("up", START_S)
        assert up["mdns_problem"] == ""
        mini_id = up["id"]
        serve.process.wait_for("ready", START_S)
        answer = _ask(box, "desk", f"{serve.url}/v1/completions", model.body())
        assert answer["choices"][0]["token_ids"] == list(model.asked.ids)
        _assert_little_received(serve.process, model, strangers={"mini"})
        [stage] = [s for s in happenings(serve.process, "planned")[-1]["plan"]["stages"] if s["members"] == [mini_id]]
        eventually(
            lambda: _held_bytes(box, serve.url) == {"desk": 0, "mini": model.slice_bytes(stage)},
            "the status says what lies on whose disk",
        )
    assert not processes_of(cluster)


@pytest.fixture
def slow_desk(box: Lan) -> Iterator[None]:
    """The coordinator's link is slow enough that something can happen during a transfer."""
    box.set_rate("desk", 40)
    yield
    box.set_rate("desk", None)


@pytest.mark.usefixtures("slow_desk")
def test_a_disk_that_fills_up_during_a_transfer_is_said_and_nothing_that_arrived_is_lost(
    box: Lan, model: Model, tmp_path: Path
) -> None:
    state = tmp_path / "mini"
    state.mkdir()
    disk = hiding(small={state: 64 * 1024 * 1024})
    with _desk_alone(box, model, tmp_path) as serve, _mini(box, model, state, serve, disk) as join:
        _wait_for_received(serve.process, 0.6 * _model_bytes(model))
        filler = Path(f"/proc/{join.pid}/root{state}/filler")  # its disk is its own
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        assert "is full" in str(serve.process.wait_for("interrupted", START_S)["reason"])
        filler.unlink()
        _assert_ready_without_starting_over(serve, model)


@pytest.mark.usefixtures("slow_desk")
def test_a_node_that_is_killed_during_a_transfer_goes_on_where_it_was(box: Lan, model: Model, tmp_path: Path) -> None:
    with _desk_alone(box, model, tmp_path) as serve:
        with _mini(box, model, tmp_path / "mini", serve) as join:
            _wait_for_received(serve.process, 0.6 * _model_bytes(model))
            os.kill(join.pid, signal.SIGKILL)
            serve.process.wait_for("node_left", START_S)
        with _mini(box, model, tmp_path / "mini", serve):
            _assert_ready_without_starting_over(serve, model)


def _desk_alone(box: Lan, model: Model, tmp_path: Path) -> AbstractContextManager[Coordinator]:
    options = ["--no-local-node", "--no-mdns", "--host", box.address("desk")]
    return serving(model.folder, new_cluster(), tmp_path / "desk", *options, cluster_host="", prefix=box.prefix("desk"))


def _mini(
    box: Lan, model: Model, state: Path, serve: Coordinator, disk: Sequence[str] = ()
) -> AbstractContextManager[Process]:
    prefix = [*box.prefix("mini", machine_id="b" * 32, hidden=[model.folder]), *disk]
    where = ["--no-mdns", "--coordinator", f"{box.address('desk')}:{serve.port}"]
    return joined("mini", OTHER, serve.cluster, state, *where, host="", prefix=prefix)


def _model_bytes(model: Model) -> int:
    return model.slice_bytes({"layers": {"first": 0, "last": LAYERS}})


def _wait_for_received(coordinator: Process, count: float) -> None:
    while coordinator.wait_for("loading", START_S)["report"]["received_bytes"] < count:
        pass


def _assert_ready_without_starting_over(serve: Coordinator, model: Model) -> None:
    serve.process.wait_for("ready", START_S)
    received, latest = 0, 0  # of all attempts, each of which counts from zero
    for report in [said["report"] for said in happenings(serve.process, "loading")]:
        if report["phase"] == "fetching":
            received, latest = received + max(report["received_bytes"] - latest, 0), report["received_bytes"]
    assert received <= _model_bytes(model) * 1.05 + _UNDER_WAY_BYTES


def test_where_multicast_is_not_carried_addresses_do(box: Lan, model: Model, tmp_path: Path) -> None:
    """One node is named to the coordinator, the other names the coordinator. Both disks are empty; the client is on a
    third machine. A cable that is pulled in the middle of an answer makes it pause, and plugged in, go on."""
    cluster = new_cluster()
    box.set_multicast(carried=False)
    try:
        with ExitStack() as stack:
            peer = ["--peer", f"{box.address('mini')}:7451", "--no-local-node", "--min-nodes", "2"]
            options = [*peer, "--host", box.address("desk")]
            serve = stack.enter_context(
                serving(model.folder, cluster, tmp_path / "desk", *options, cluster_host="", prefix=box.prefix("desk"))
            )
            places = {"mini": ["--port", "7451"], "studio": ["--coordinator", f"{box.address('desk')}:{serve.port}"]}
            for name, backend in (("mini", OTHER), ("studio", "torch")):
                prefix = box.prefix(name, machine_id=name[0].encode().hex() * 16, hidden=[model.folder])
                node = joined(name, backend, cluster, tmp_path / name, *places[name], host="", prefix=prefix)
                stack.enter_context(node)
            serve.process.wait_for("ready", START_S)
            url = f"{serve.url}/v1/completions"
            assert _ask(box, "studio", url, model.body())["choices"][0]["token_ids"] == list(model.asked.ids)
            _assert_little_received(serve.process, model, strangers={"mini", "studio"})

            _assert_an_answer_outlasts_a_pulled_cable(box, url, model)
            assert _ask(box, "studio", url, model.body())["choices"][0]["token_ids"] == list(model.asked.ids)
    finally:
        box.set_multicast(carried=True)
    assert not processes_of(cluster)


def _assert_an_answer_outlasts_a_pulled_cable(box: Lan, url: str, model: Model) -> None:
    """Nobody else can hold the layers beyond it; so the answer waits, and the machines load and compute once more."""
    expected = _ask(box, "studio", url, model.body(max_tokens=_LONG))["choices"][0]["token_ids"]
    command = _command(box, "desk", url, model.body(max_tokens=_LONG, stream=True))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        try:
            said = [client.stdout.readline() for _ in range(4)]
            box.set_link("mini", up=False)
            time.sleep(_PULLED_S)
            box.set_link("mini", up=True)
            said += client.communicate(timeout=START_S)[0].splitlines()
        finally:
            box.set_link("mini", up=True)
            client.kill()
    events = [json.loads(line.removeprefix("data: ")) for line in said if line.startswith("data: {")]
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == expected
    assert said[-2:].count("data: [DONE]") == 1
