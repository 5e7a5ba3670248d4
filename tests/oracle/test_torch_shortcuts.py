"""The torch engine's shorter ways through modules: the same numbers, without torch's own calls in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from node.engines.torch import engine as torch_engine
from node.engines.torch.shortcuts import Shortcut, take_shortcuts
from tests.checkpoints import FAMILIES, MORE_FAMILIES, STATE_FAMILIES, make_checkpoint
from tests.oracle.pipelines import row, run_step
from tests.oracle.reference import random_prompt
from tests.oracle.test_torch_engine import torch_pipeline

Checkpoints = Callable[[str], Path]


def answers(folder: Path) -> list[np.ndarray]:
    """Logits after two prompts of one step, after one token of each, and after a chunk of one beside a token."""
    engines = torch_pipeline(folder, (3,))
    first, second = random_prompt(30, seed=1), random_prompt(9, seed=2)
    steps = (
        [row(1, 0, first), row(2, 0, second)],
        [row(1, 30, first[:1]), row(2, 9, second[:1])],
        [row(1, 31, second), row(2, 10, first[:1])],
    )
    return [run_step(engines, list(rows)) for rows in steps]


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *STATE_FAMILIES])
def test_shortcuts_change_no_bit(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, where matrices lie in the order of the processor's products."""
    folder = make_checkpoint(family, tmp_path, dtype="bfloat16")
    found = answers(folder)
    monkeypatch.setattr(torch_engine, "take_shortcuts", lambda model: None)
    for ours, theirs in zip(found, answers(folder), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_step_calls_only_the_model_by_torchs_way(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    (engine,) = torch_pipeline(checkpoint("llama"))
    called: list[str] = []
    call = torch.nn.Module._call_impl

    def counting(self: torch.nn.Module, *args: Any, **named: Any) -> Any:
        called.append(type(self).__name__)
        return call(self, *args, **named)

    monkeypatch.setattr(torch.nn.Module, "_call_impl", counting)
    run_step([engine], [row(1, 0, random_prompt(5, seed=0))])
    assert called == ["LlamaForCausalLM"]


class _CalledItsOwnWay(torch.nn.Identity):
    def __call__(self, value: int) -> int:
        return value + 1


class _Parent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.nn.Linear(2, 2)
        self.hooked = torch.nn.Identity()
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.own = _CalledItsOwnWay()
        self.row = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
        self.layers = torch.nn.ModuleList([torch.nn.Identity() for _ in range(3)])


def test_only_what_needs_nothing_of_torchs_call_is_shortened() -> None:
    parent = _Parent()
    names = [name for name, _ in parent.named_modules()]
    take_shortcuts(parent)
    assert type(parent.plain) is Shortcut
    assert (parent.hooked(1), parent.own(1)) == (2, 2)
    assert type(parent.row) is torch.nn.Sequential
    assert [type(layer) for layer in parent.layers[:2]] == [Shortcut] * 2
    assert [name for name, _ in parent.named_modules()] == names
    assert all(isinstance(parent.get_submodule(name), torch.nn.Module) for name in names)
    assert {name for name, _ in parent.named_parameters()} == {"plain.weight", "plain.bias"}


def test_a_shortcut_is_like_its_child() -> None:
    child = torch.nn.Linear(2, 3)
    shortcut = Shortcut(child)
    assert isinstance(shortcut, torch.nn.Linear)
    assert shortcut.out_features == 3
    assert shortcut.weight is child.weight
    assert torch.equal(shortcut(torch.ones(2)), child(torch.ones(2)))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        shortcut.nothing_like_it  # noqa: B018 - the lookup is what is tested
