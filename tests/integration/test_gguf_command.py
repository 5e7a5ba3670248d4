"""A GGUF file on the command line: planned from its header, served over HTTP, and refused in one line."""

from __future__ import annotations

import filecmp
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tokenizers

pytest.importorskip("torch", reason="the model is made with transformers: the extra [torch]")

from cluster.cli.serve import potluck_command
from coordinator.gguf.store import ConversionStore
from tests.checkpoints import make_checkpoint
from tests.gguf_files import gguf_bytes
from tests.gguf_models import WIDE, as_q4_k_m, write_model
from tests.gguf_paper import METADATA, paper_gguf, paper_tensors
from tests.integration.live import Coordinator, Pool, eventually, has_backend

PROMPT = "<|begin|><|user|>warm bread<|end|><|assistant|>"
"""What the model's own template makes of a question."""


def potluck(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(potluck_command(*arguments), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("source"), layers=2, **WIDE)


def ask(coordinator: Coordinator, text: str) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    response = coordinator.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return response.json()


def test_an_unpacked_file_answers_a_chat_as_transformers_does(source: Path, pool: Pool, tmp_path: Path) -> None:
    from tests.oracle.reference import WholeModel

    path = write_model(source, tmp_path / "gguf" / "tiny.F32.gguf", lambda name: "F32")
    backend = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    prompt = backend.encode(PROMPT).ids
    expected = WholeModel(path.parent / "unpacked").greedy(prompt, 12).ids
    nodes = ("torch-a", "mlx-a") if has_backend("mlx") else ("torch-a", "torch-b")
    with pool.serving(path, nodes) as coordinator:
        said = ask(coordinator, "warm bread")
        assert coordinator.get("/v1/models").json()["data"][0]["id"] == "tiny.F32"
    assert said["usage"]["prompt_tokens"] == len(prompt)
    assert said["choices"][0]["message"]["content"] == backend.decode(expected)


@pytest.mark.skipif(not has_backend("mlx"), reason="the engine to compare with needs the extra [mlx]")
def test_a_packed_file_answers_as_one_engine_does_with_the_same_folder(
    source: Path, pool: Pool, tmp_path: Path
) -> None:
    from node.engines.mlx.engine import MlxEngine
    from tests.oracle.pipelines import greedy, load_pipeline, stage_specs

    path = write_model(source, tmp_path / "gguf" / "tiny.Q4_K_M.gguf", as_q4_k_m)
    folder = ConversionStore(tmp_path / "converted").make(path)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = backend.encode(PROMPT).ids
    ids, _ = greedy(load_pipeline([MlxEngine], stage_specs(folder, ())), prompt, 12)
    with pool.serving(path, ("mlx-a",)) as coordinator:
        said = ask(coordinator, "warm bread")
        assert "converting tiny.Q4_K_M.gguf" in coordinator.process.output()
    assert said["choices"][0]["message"]["content"] == backend.decode(ids)


def test_a_file_is_planned_without_being_converted(tmp_path: Path) -> None:
    path = paper_gguf(tmp_path / "paper.gguf", None, paper_tensors("F16", "F16"))
    result = potluck("plan", str(path), "--json", "--no-mdns", "--state", str(tmp_path / "state"))
    assert result.returncode == 0, result.stderr
    [stage] = json.loads(result.stdout)["stages"]
    values = path.stat().st_size / 2
    assert (stage["first_layer"], stage["last_layer"]) == (0, 2)
    assert values < stage["weight_bytes"] < 2.2 * values
    assert not (tmp_path / "state" / "coordinator").exists()


GOOD = gguf_bytes(METADATA, paper_tensors())
BAD = {
    "cut short": (GOOD[:-100], "but the file ends after"),
    "cut in the header": (GOOD[:200], "but the file ends before"),
    "no GGUF": (b"PK\x03\x04" + bytes(1000), "expected a GGUF file"),
    "another architecture": (gguf_bytes(METADATA | {"general.architecture": "rwkv7"}, {}), "'rwkv7' is not converted"),
    "an unread type": (gguf_bytes(METADATA, {"w": ("Q2_K", (1, 256), bytes(84))}), "stored as Q2_K"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_file_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    data, said = BAD[fault]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    result = potluck("models", "pull", str(path), "--state", str(tmp_path / "state"))
    assert result.returncode == 1
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(path) in result.stderr


def wide_paper(path: Path) -> Path:
    """The paper model with MLPs of zeros so wide that converting them takes seconds."""
    wide = 1 << 16
    shapes = {"ffn_gate": (wide, 256), "ffn_up": (wide, 256), "ffn_down": (256, wide)}
    tensors = paper_tensors() | {
        f"blk.{layer}.{name}.weight": ("Q8_0", shape, bytes(wide * 256 // 32 * 34))
        for layer in (0, 1)
        for name, shape in shapes.items()
    }
    return paper_gguf(path, {"llama.feed_forward_length": wide}, tensors)


def test_a_killed_conversion_is_made_again_and_is_whole(tmp_path: Path) -> None:
    path, state = wide_paper(tmp_path / "wide.gguf"), tmp_path / "state"
    pull = potluck_command("models", "pull", str(path), "--state", str(state), "--json")
    killed = subprocess.Popen(pull, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = (state / "coordinator" / "converted").glob
    eventually(lambda: any(part.stat().st_size for part in begun("*.part/.*.begun")), "something is written", 60)
    killed.kill()
    killed.wait()
    assert not [made for made in begun("wide-*") if made.suffix != ".part"]
    again = subprocess.run(pull, capture_output=True, text=True, timeout=120, check=True)
    found = Path(json.loads(again.stdout)["folder"])
    assert sorted(found.parent.glob("wide-*")) == [found]
    straight = ConversionStore(tmp_path / "straight").make(path)
    for name in (file.name for file in straight.iterdir()):
        assert filecmp.cmp(found / name, straight / name, shallow=False)


def test_what_was_converted_is_listed_traced_and_removed(tmp_path: Path) -> None:
    path, state = paper_gguf(tmp_path / "paper.gguf"), str(tmp_path / "state")
    pulled = json.loads(potluck("models", "pull", str(path), "--state", state, "--json").stdout)
    listed = json.loads(potluck("models", "list", "--state", state, "--json").stdout)["converted"]
    assert [(model["name"], model["folder"], model["whole"]) for model in listed] == [("paper", pulled["folder"], True)]
    told = json.loads(potluck("models", "provenance", str(path), "--state", state, "--json").stdout)
    assert (told["source"], told["licence"], told["id"]) == (str(path), "mit", pulled["id"])
    assert told["conversions"][0].startswith("converted from GGUF by Potluck")
    removed = potluck("models", "remove", "paper.gguf", "--state", state)
    assert removed.returncode == 0, removed.stderr
    assert not Path(pulled["folder"]).exists()
    assert potluck("models", "remove", "paper.gguf", "--state", state).returncode == 1
