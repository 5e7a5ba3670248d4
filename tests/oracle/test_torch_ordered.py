"""Plain 16-bit matrices in the order of the CPU's products: the files' numbers, computed as exactly as before, and as
they were for everything that is no product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from node.engines.torch import ordered, packing
from node.engines.torch.engine import TorchEngine
from node.engines.torch.ordered import Ordered, OrderedStack, has_order, in_order
from node.engines.torch.packing import stand_ins
from tests.checkpoints import make_checkpoint
from tests.oracle.pipelines import load_pipeline, run_prefill, run_step, stage_specs
from tests.oracle.pipelines import row as one_row
from tests.oracle.reference import WholeModel, random_prompt

needs_order = pytest.mark.skipif(not has_order(torch.bfloat16), reason="this processor's products have no order")

FAMILIES = (
    "llama",
    "qwen2",
    "gemma3",
    "qwen3_moe",
    "phi3",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
    "lfm2",
    "gemma4_small",
)
"""Biases, tied heads, fused matrices, experts, latents, states, layers' own inputs."""


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16()


def ordered_of(plain: torch.Tensor) -> Ordered:
    return in_order(plain.shape, plain.dtype, lambda rows, first: rows.copy_(plain[first : first + len(rows)]))


@needs_order
@pytest.mark.parametrize("part_bytes", [1 << 20, 1])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(192, 96, 1), (200, 72, 5), (130, 33, 70), (64, 64, 0)])
def test_a_product_is_that_of_the_plain_matrix(
    rows: int, columns: int, tokens: int, biased: bool, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered, "_PART_BYTES", part_bytes)
    plain, x = matrix(rows, columns), matrix(tokens + 1, columns)[:tokens]
    bias = matrix(rows, 1)[:, 0] if biased else None
    found = ordered_of(plain)
    assert (len(found.parts) > 1) == (part_bytes == 1 and rows > 64)
    assert torch.equal(found.plain(), plain)
    exact = linear(x.double(), plain.double(), None if bias is None else bias.double())
    result = linear(x, found, bias)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), exact, rtol=2**-8, atol=1e-3)
    torch.testing.assert_close(linear(x[None], found, bias=bias)[0], result, rtol=0, atol=0)


@needs_order
def test_what_is_no_product_sees_the_plain_matrix() -> None:
    plain = matrix(128, 64)
    found = ordered_of(plain)
    assert torch.equal(torch.mul(found, 2), plain * 2)
    assert torch.equal(found.T, plain.T)
    assert (found.shape, found.dtype, found.nbytes) == (plain.shape, plain.dtype, plain.nbytes)


@needs_order
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_as_exact_as_transformers(family: str, tmp_path: Path) -> None:
    """Compared with the same numbers in float32, whatever rounds them: a prompt, then a token after it."""
    folder = make_checkpoint(family, tmp_path, dtype="bfloat16")
    prompt = random_prompt(40, seed=1)
    whole = WholeModel(folder)
    theirs = whole.logits(prompt)[-2:]
    exact = whole.in_float32().logits(prompt)[-2:]  # changes the model
    engines = load_pipeline([TorchEngine] * 2, stage_specs(folder, (1,)))
    assert any(isinstance(item, Ordered) for engine in engines for item in stand_ins(engine._stage.sliced.model))
    ours = np.stack([run_prefill(engines, prompt[:-1]), run_step(engines, [one_row(1, 39, prompt[-1:])])[0]])
    assert np.abs(ours - exact).max() <= 1.5 * np.abs(theirs - exact).max()


@needs_order
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "qwen3_moe", "qwen3_next"])
def test_what_is_only_multiplied_is_put_in_order(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the plain matrix, never beside it; as it was where the processor has no such products."""
    spec = stage_specs(make_checkpoint(family, tmp_path, dtype="bfloat16"), ())[0]
    engine, without = TorchEngine(), TorchEngine()
    engine.load(spec, lambda progress: None)
    monkeypatch.setattr(packing, "has_order", lambda dtype: False)
    without.load(spec, lambda progress: None)
    model, plain = engine._stage.sliced.model, without._stage.sliced.model
    assert not stand_ins(plain)
    left = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        owner, _, attribute = name.rpartition(".")
        found = getattr(model.get_submodule(owner), attribute)
        is_in_order = isinstance(found, Ordered | OrderedStack)
        assert torch.equal(found.plain() if is_in_order else found, parameter), name
        linears = isinstance(plain.get_submodule(owner), torch.nn.Linear) and attribute == "weight"
        tied = name == "lm_head.weight" and plain.config.tie_word_embeddings
        multiplied = linears and not tied and "kv_b_proj" not in name
        assert is_in_order == (multiplied or (parameter.ndim == 3 and ".experts." in name)), name
        assert (name in left) != is_in_order
    assert engine.capacity().weight_bytes == without.capacity().weight_bytes


def rewritten(folder: Path, layout: str) -> None:
    """Store the experts as other tools do: `halves` of all in a tensor each, as mlx-lm has them, or `whole`."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    stacks: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for name in [name for name in tensors if ".experts." in name]:
        block, index, part, _ = name.rsplit(".", 3)
        stacks.setdefault((block.removesuffix(".experts"), part), {})[int(index)] = tensors.pop(name)
    stacked = {key: torch.stack([experts[index] for index in sorted(experts)]) for key, experts in stacks.items()}
    for (block, part), stack in stacked.items():
        if layout == "halves":
            tensors[f"{block}.switch_mlp.{part}.weight"] = stack
        elif part == "down_proj":
            tensors[f"{block}.experts.down_proj"] = stack
        elif part == "gate_proj":
            tensors[f"{block}.experts.gate_up_proj"] = torch.cat([stack, stacked[block, "up_proj"]], dim=1)
    save_file(tensors, file)


@needs_order
@pytest.mark.parametrize("layout", ["halves", "whole"])
def test_experts_are_found_wherever_files_keep_them(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path, dtype="bfloat16")
    engine, other = TorchEngine(), TorchEngine()
    engine.load(stage_specs(folder, ())[0], lambda progress: None)
    rewritten(folder, layout)
    monkeypatch.setattr(ordered, "_PART_BYTES", 1)  # parts that begin within gates and end within ups
    monkeypatch.setattr(ordered, "_BLOCK_ROWS", 24)
    other.load(stage_specs(folder, ())[0], lambda progress: None)
    models = [loaded._stage.sliced.model for loaded in (engine, other)]
    singly, stacked = ([item for item in stand_ins(model) if isinstance(item, OrderedStack)] for model in models)
    assert len(singly) == len(stacked) > 0
    for theirs, ours in zip(singly, stacked, strict=True):
        assert len(ours[0].parts) > 1
        assert torch.equal(ours.plain(), theirs.plain())
