"""Requests, model folders and disks that are not as they should be: a clear error each time, and service goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("torch", reason="the checkpoint is made with transformers: the extra [torch]")

from cluster.addresses import split_host_port
from cluster.cli.serve import potluck_command
from cluster.limits import HTTP_BODY_BYTES_MAX
from cluster.transport import Credentials
from cluster.wire import node_pb2 as pb
from cluster.wire import node_pb2_grpc as rpc
from tests.integration.answers import Served
from tests.integration.live import (
    CONTEXT,
    START_S,
    Bystander,
    Coordinator,
    Pool,
    has_backend,
    joined,
    new_cluster,
    serving,
)
from tests.integration.mounts import hiding, require_mounts

OTHER = "mlx-b" if has_backend("mlx") else "torch-d"
"""A node that `mixed` does not use."""


@pytest.fixture
def unharmed(mixed: Coordinator, served: Served) -> Iterator[None]:
    """Somebody else's answers stay right all the while."""
    with Bystander(mixed, served.asked.prompt, served.asked.ids):
        yield


# -- Requests --------------------------------------------------------------------------------------------

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}

BAD_REQUESTS: dict[str, tuple[str, bytes, int, str | None]] = {
    "a prompt beyond the context": (COMPLETIONS, json.dumps({"prompt": [9] * CONTEXT}).encode(), 400, "prompt"),
    "a giant text": (COMPLETIONS, json.dumps({"prompt": "word " * 400_000}).encode(), 400, "prompt"),
    "a giant message": (
        CHAT, json.dumps({"messages": [{"role": "user", "content": "word " * 400_000}]}).encode(), 400, "messages"
    ),
    "more tokens than the context": (COMPLETIONS, b'{"prompt": [9], "max_tokens": 5000}', 400, "max_tokens"),
    "no messages": (CHAT, b'{"messages": []}', 400, "messages"),
    "no prompt": (COMPLETIONS, b"{}", 400, "prompt"),
    "an empty prompt": (COMPLETIONS, b'{"prompt": []}', 400, "prompt"),
    "a token outside the vocabulary": (COMPLETIONS, b'{"prompt": [9, 100000]}', 400, "prompt"),
    "a negative token": (COMPLETIONS, b'{"prompt": [-1]}', 400, "prompt"),
    "invalid UTF-8": (CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, None),
    "half a surrogate": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages"),
    "no JSON": (CHAT, b"hello", 400, None),
    "a list": (CHAT, b"[]", 400, None),
    "deep brackets": (CHAT, b"[" * 100_000, 400, None),
    "an unknown role": (CHAT, b'{"messages": [{"role": "boss", "content": "hi"}]}', 400, "messages"),
    "a body over the limit": (CHAT, b" " * (HTTP_BODY_BYTES_MAX + 1), 413, None),
    "NaN as temperature": (COMPLETIONS, b'{"prompt": [9], "temperature": NaN}', 400, None),
    "a temperature as text": (COMPLETIONS, b'{"prompt": [9], "temperature": "1"}', 400, "temperature"),
    "a thousand choices": (COMPLETIONS, b'{"prompt": [9], "n": 1000}', 400, "n"),
}  # fmt: skip


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_the_reason(what: str, mixed: Coordinator) -> None:
    path, body, status, param = BAD_REQUESTS[what]
    try:
        response = httpx.post(mixed.url + path, content=body, timeout=60.0)
    except httpx.WriteError:
        assert status == 413  # refused while it was still being sent
        return
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert (error["param"] or "").partition("[")[0].partition(".")[0] == param


# -- Model folders ---------------------------------------------------------------------------------------

WEIGHTS = "model.safetensors"


def _config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def _rewrite(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def _truncate(data: bytearray) -> None:
    del data[-1000:]


def _lie_about_the_header(data: bytearray) -> None:
    data[:8] = struct.pack("<Q", 1 << 60)


def _flip_last_bit(data: bytearray) -> None:
    data[-1] ^= 1


def _rename_tensor(data: bytearray) -> None:
    at = data.index(b"model.layers.3.mlp.down_proj.weight")
    data[at + len(b"model.layers.3.mlp.")] ^= 1  # one bit: down_proj becomes another name


def _flip_in_header(data: bytearray) -> None:
    data[8 + data[8:].index(b'"dtype"')] ^= 1  # a quotation mark of the JSON header


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (lambda at: _rewrite(at / WEIGHTS, _truncate), WEIGHTS),
    "empty weights": (lambda at: (at / WEIGHTS).write_bytes(b""), WEIGHTS),
    "a lying header length": (
        lambda at: _rewrite(at / WEIGHTS, _lie_about_the_header), WEIGHTS
    ),
    "a bit-flipped header": (lambda at: _rewrite(at / WEIGHTS, _flip_in_header), WEIGHTS),
    "a tensor under another name": (lambda at: _rewrite(at / WEIGHTS, _rename_tensor), "layer 3 lacks mlp.down_proj"),
    "no weights": (lambda at: (at / WEIGHTS).unlink(), "safetensors"),
    "an unknown architecture": (
        lambda at: _config(at, architectures=["FrobForCausalLM"], model_type="frob"), "FrobForCausalLM"
    ),
    "more layers than weights": (lambda at: _config(at, num_hidden_layers=60, layer_types=None), "layer 6 is missing"),
    "another hidden size": (lambda at: _config(at, hidden_size=96), "shape"),
    "no configuration": (lambda at: (at / "config.json").unlink(), "config.json"),
    "a configuration that is no JSON": (lambda at: (at / "config.json").write_text("{"), "config.json"),
    "no tokenizer": (lambda at: (at / "tokenizer.json").unlink(), "tokenizer"),
    "no such folder": (lambda at: shutil.rmtree(at), "model"),
}  # fmt: skip


@pytest.fixture
def copy(served: Served, tmp_path: Path) -> Path:
    """The model's folder, to be broken."""
    return Path(shutil.copytree(served.folder, tmp_path / "model"))


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_folder_ends_serve_with_the_reason(what: str, copy: Path, tmp_path: Path) -> None:
    break_it, mentioned = BROKEN[what]
    break_it(copy)
    command = ["serve", str(copy), "--no-local-node", "--no-mdns", "--cluster", new_cluster(), "--port", "0"]
    command += ["--cluster-host", "127.0.0.1", "--cluster-port", "0", "--state", str(tmp_path / "state")]
    ended = subprocess.run(potluck_command(*command), capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("potluck: ")]
    assert mentioned in line


# -- Models and nodes that do not go together ------------------------------------------------------------


@pytest.mark.usefixtures("unharmed")
def test_a_model_that_does_not_fit_waits_and_says_how_much_is_missing(
    pool: Pool, served: Served, tmp_path: Path
) -> None:
    with _waiting(pool, served.folder, tmp_path, context=4096, users=256) as coordinator:
        _announce(coordinator, pool)
        coordinator.process.wait_for("node_joined", START_S)
        reason = "waiting"
        while reason.startswith("waiting"):  # for nodes, or a moment for more of them
            reason = str(coordinator.process.wait_for("waiting", START_S)["reason"])
        assert "MiB" in reason or "GiB" in reason
        assert "missing" in reason
        ready = coordinator.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, reason)


@pytest.mark.usefixtures("unharmed")
def test_weights_that_change_after_the_start_are_refused_by_the_tensors_name(
    pool: Pool, copy: Path, tmp_path: Path
) -> None:
    with _waiting(pool, copy, tmp_path / "state") as coordinator:
        _rewrite(copy / WEIGHTS, _flip_last_bit)
        last = _last_tensor(copy / WEIGHTS)
        _announce(coordinator, pool)
        reason = str(coordinator.process.wait_for("interrupted", START_S)["reason"])
        assert last in reason
        assert WEIGHTS in reason
        assert coordinator.get("/health").status_code == 200
        assert coordinator.get("/ready").status_code == 503


def _last_tensor(path: Path) -> str:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    header.pop("__metadata__", None)
    return str(max(header, key=lambda name: header[name]["data_offsets"][1]))


@contextlib.contextmanager
def _waiting(pool: Pool, model: Path, state: Path, **settings: int) -> Iterator[Coordinator]:
    """A coordinator of the pool's cluster that has read its model and knows of no node yet."""
    pool.need(OTHER)
    with serving(model, pool.cluster, state, "--no-local-node", "--no-mdns", context=settings.get("context", CONTEXT),
                 users=settings.get("users", 1)) as coordinator:  # fmt: skip
        coordinator.process.wait_for("waiting", START_S)
        yield coordinator


def _announce(coordinator: Coordinator, pool: Pool) -> None:
    """Say on the node's behalf where it listens, as `join --coordinator` does."""

    async def call() -> None:
        host, port = split_host_port(pool.addresses[OTHER])
        async with Credentials().channel(f"127.0.0.1:{coordinator.port}") as channel:
            stub: rpc.CoordinatorAsyncStub = rpc.CoordinatorStub(channel)
            request = pb.AnnounceRequest(cluster=pool.cluster, host=host, port=port, node_id=pool.ids[OTHER])
            assert (await stub.Announce(request, timeout=30)).accepted

    asyncio.run(call())


# -- Disks -----------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.usefixtures("unharmed")
def test_a_full_disk_at_a_node_is_said_and_the_coordinator_stays(served: Served, tmp_path: Path) -> None:
    """The node sees neither the model's folder nor room for its layers."""
    require_mounts()
    cluster = new_cluster()
    state = tmp_path / "node"
    state.mkdir()
    prefix = hiding(served.folder, small={state: 300 * 1024})
    options = ["--no-local-node", "--no-mdns"]
    with serving(served.folder, cluster, tmp_path / "c", *options) as coordinator:
        to = ["--no-mdns", "--coordinator", f"127.0.0.1:{coordinator.port}"]
        with joined("full", "mlx" if has_backend("mlx") else "torch", cluster, state, *to, prefix=prefix):
            reason = str(coordinator.process.wait_for("interrupted", START_S)["reason"])
            assert "too little" in reason and str(state) in reason and "--state" in reason
            assert coordinator.get("/health").status_code == 200
            assert reason in coordinator.get("/ready").json()["reason"]
