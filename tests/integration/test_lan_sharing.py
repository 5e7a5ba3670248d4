"""A real cluster whose coordinator has a slow link: a node gets its slice from the node that has the model already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the checkpoint is made with transformers: the extra [torch]")

from cluster.cli.child import Process
from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.types import LayerRange
from tests.checkpoints import make_checkpoint
from tests.integration.live import (
    START_S,
    Coordinator,
    happenings,
    has_backend,
    joined,
    new_cluster,
    serving,
)
from tests.integration.netns import Lan, lan, require_lan

pytestmark = pytest.mark.root

LAYERS = 6
BACKENDS = {"mini": "mlx" if has_backend("mlx") else "torch", "studio": "torch"}
PORT = 7451
SLOW_MBIT_S = 20
"""Five seconds for the slice, in which the other node sends all of it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 25 MB."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 32}
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("lan-model"), layers=LAYERS, **sizes)


@pytest.fixture
def box() -> Iterator[Lan]:
    require_lan()
    with lan("desk", *BACKENDS) as made:
        yield made


def test_a_node_gets_its_slice_from_the_node_that_has_it(box: Lan, model: Path, tmp_path: Path) -> None:
    cluster = new_cluster()
    with _node(box, "mini", model, cluster, tmp_path) as mini, _node(box, "studio", model, cluster, tmp_path) as studio:
        names = {str(node.wait_for("up", START_S)["id"]): name for node, name in ((mini, "mini"), (studio, "studio"))}
        with _coordinator(box, model, cluster, tmp_path / "first", "mini") as first:
            first.wait_ready()
            assert _received_bytes(first, "mini") >= _slice_bytes(model, LayerRange(0, LAYERS))
        box.set_rate("desk", SLOW_MBIT_S)
        before = {name: box.sent_bytes(name) for name in ("desk", "mini")}
        with _coordinator(box, model, cluster, tmp_path / "second", "mini", "studio") as second:
            second.wait_ready()
            sent = {name: box.sent_bytes(name) - count for name, count in before.items()}
            plan = happenings(second.process, "planned")[-1]["plan"]
            [stage] = [stage for stage in plan["stages"] if names[stage["members"][0]] == "studio"]
            owned_bytes = _slice_bytes(model, LayerRange(stage["layers"]["first"], stage["layers"]["last"]))
            assert owned_bytes <= _received_bytes(second, "studio") <= owned_bytes * 1.05
            assert _received_bytes(second, "mini") <= owned_bytes * 0.05, "it has everything"
            assert sent["mini"] >= owned_bytes / 2, f"of {owned_bytes} bytes: {sent}"
            assert sent["desk"] < owned_bytes / 2, f"of {owned_bytes} bytes: {sent}"


def _node(box: Lan, name: str, model: Path, cluster: str, folder: Path) -> AbstractContextManager[Process]:
    """On a machine of its own, which has never seen the model."""
    prefix = box.prefix(name, machine_id=name[0].encode().hex() * 16, hidden=[model])
    options = ["--no-mdns", "--port", str(PORT)]
    return joined(name, BACKENDS[name], cluster, folder / name, *options, host="", prefix=prefix)


def _coordinator(box: Lan, model: Path, cluster: str, state: Path, *nodes: str) -> AbstractContextManager[Coordinator]:
    options = ["--no-local-node", "--no-mdns", "--host", box.address("desk"), "--min-nodes", str(len(nodes))]
    options += [word for node in nodes for word in ("--peer", f"{box.address(node)}:{PORT}")]
    return serving(model, cluster, state, *options, cluster_host="", prefix=box.prefix("desk"))


def _slice_bytes(model: Path, layers: LayerRange) -> int:
    return sum(tensor.end - tensor.begin for tensor in owned_tensors(open_checkpoint(model), layers, LAYERS))


def _received_bytes(coordinator: Coordinator, node: str) -> int:
    reports = [said["report"] for said in happenings(coordinator.process, "loading") if said["node"] == node]
    return max((int(report["received_bytes"]) for report in reports), default=0)
