"""Loading packed weights into the torch engine: in little more memory than they take, and nothing that does not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("mlx_lm", reason="the checkpoints are made by mlx-lm")

from cluster.errors import ModelError
from cluster.quantities import MIB
from node.engine import LoadProgress
from node.engines.torch.engine import TorchEngine
from node.engines.torch.packing import stand_ins
from tests.checkpoints import make_checkpoint
from tests.converted import convert
from tests.oracle.pipelines import load_pipeline, stage_specs

Checkpoints = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]

PATH = "model.layers.1.mlp.down_proj"
PARTS = ("weight", "scales", "biases")
EXPERTS = "model.layers.1.mlp.switch_mlp.down_proj"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        return convert(make_checkpoint(family, folder / "plain", layers=2), folder / "packed", bits=4)

    return make


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_every_matrix_is_packed_in_memory_and_comes_from_the_file(family: str, packed: Checkpoints) -> None:
    reports: list[LoadProgress] = []
    engine = TorchEngine()
    engine.load(stage_specs(packed(family), ())[0], reports.append)
    assert engine._stage is not None
    model = engine._stage.sliced.model
    unpacked = {name: tensor.numel() for name, tensor in model.named_parameters() if tensor.ndim > 1}
    # Routers are as narrow as there are experts; mlx-lm packs them as well.
    assert unpacked == {}
    plain_bytes = sum(tensor.nbytes for _, tensor in model.named_parameters())
    in_files = sum(tensor.nbytes for tensor in load_file(packed(family) / "model.safetensors").values())
    assert plain_bytes + sum(item.nbytes for item in stand_ins(model)) == in_files == engine.capacity().weight_bytes
    assert reports[-1].done_bytes == reports[-1].total_bytes == in_files


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        found = change(tensors.pop(name))
        if found is not None:
            tensors[name] = found.contiguous()

    return apply


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", changed(f"{PATH}.biases", lambda tensor: None), "packed in a way that Potluck does not know"),
        ("llama", changed(f"{PATH}.scales", lambda tensor: None), r"no place for|stored as U32"),
        ("llama", changed(f"{PATH}.scales", lambda tensor: tensor[:, :0]), "expected numbers that scale"),
        ("llama", changed(f"{PATH}.scales", lambda tensor: tensor.long()), "expected numbers that scale"),
        ("llama", changed(f"{PATH}.biases", lambda tensor: tensor[:, :1]), "are not alike"),
        ("llama", changed(f"{PATH}.biases", lambda tensor: tensor.long()), "are not alike"),
        ("llama", changed(f"{PATH}.weight", lambda tensor: tensor[:32]), "which do not fit together"),
        ("llama", changed(f"{PATH}.weight", lambda tensor: tensor[:, :15]), "config.json makes it"),
        ("llama", changed(f"{PATH}.weight", lambda tensor: tensor[None]), "which do not fit together"),
        ("qwen3_moe", changed(f"{EXPERTS}.weight", lambda tensor: tensor[:4]), "which do not fit together"),
        ("qwen3_moe", lambda t: [changed(f"{EXPERTS}.{p}", lambda x: x[:4])(t) for p in PARTS], "config.json makes it"),
        ("qwen3_moe", lambda t: [t.pop(f"{EXPERTS}.{p}") for p in PARTS], "is missing"),
    ],
)
def test_what_does_not_fit_is_refused(
    family: str, change: Callable[[Tensors], object], message: str, packed: Checkpoints, tmp_path: Path
) -> None:
    tensors = load_file(packed(family) / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    (tmp_path / "config.json").write_text((packed(family) / "config.json").read_text())
    spec = stage_specs(packed(family), ())[0]
    with pytest.raises(ModelError, match=message):
        TorchEngine().load(replace(spec, folder=tmp_path), lambda progress: None)


def test_a_stack_of_experts_that_is_packed_in_part_is_refused(packed: Checkpoints, tmp_path: Path) -> None:
    tensors = load_file(packed("qwen3_moe") / "model.safetensors")
    ups = {part: tensors.pop(f"{EXPERTS}.{part}".replace("down", "up")) for part in PARTS}
    outputs, inputs = ups["weight"].shape[1], ups["weight"].shape[2] * 8
    for index in range(len(ups["weight"])):
        tensors[f"model.layers.1.mlp.experts.{index}.up_proj.weight"] = torch.zeros(outputs, inputs)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    (tmp_path / "config.json").write_text((packed("qwen3_moe") / "config.json").read_text())
    with pytest.raises(ModelError, match="of which a part is packed and another is not"):
        load_pipeline([TorchEngine], stage_specs(tmp_path, ()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("bits", [4, 6])
def test_a_packed_load_needs_little_more_memory_than_its_slice(bits: int, tmp_path: Path) -> None:
    """At least 80 MB, put in the order of the CPU's kernel while they are read; growth of the peak at most that, a
    tenth, and what the libraries keep once they have computed a first token of such sizes."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 768, "dtype": "bfloat16"}
    folders = []
    for name, settings in (("large", {"layers": 9, **sizes}), ("warm", {"dtype": "bfloat16"})):
        plain = make_checkpoint("qwen3_moe", tmp_path / f"{name}_plain", **settings)
        folders.append(convert(plain, tmp_path / name, bits=bits, group=64 if name == "large" else 32))
    output = subprocess.run(
        [sys.executable, "-m", "tests.oracle.peak_memory", *map(str, folders)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    ).stdout
    growth_bytes, slice_bytes = map(int, output.split())
    assert slice_bytes > 75e6
    assert 0.95 * slice_bytes <= growth_bytes <= 1.10 * slice_bytes + 4 * MIB
