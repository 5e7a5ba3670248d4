"""The kernels for decode steps equal torch's attention, over ragged lengths and all that families ask of attention.

Each check runs the kernels' own source: in the words of `tests.triton_stand_in` everywhere, and by Triton's interpreter
where `make kernels` has put it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from node.engines.torch import ragged
from node.engines.torch.ragged import Ragged
from tests.oracle.ragged_cases import Case, distance
from tests.triton_stand_in import load_kernels

PROGRAMS = 32


def _by_triton() -> ModuleType:
    from node.engines.torch import ragged_kernels

    return ragged_kernels


LANGUAGES: dict[str, Callable[[], ModuleType]] = {"stand-in": load_kernels}
if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1":
    LANGUAGES["triton"] = _by_triton

RAGGED = (1, 2, 0, 17, 64, 65, 130)
CASES = {
    "one row": Case([150]),
    "lengths": Case(RAGGED),
    "every head its own keys": Case(RAGGED, heads=3, kv_heads=3),
    "six heads share keys": Case(RAGGED, heads=6, kv_heads=1),
    "twenty heads share keys": Case(RAGGED, heads=40, kv_heads=2),
    "size 16": Case(RAGGED, key_size=16, value_size=16),
    "size 80": Case(RAGGED, key_size=80, value_size=80),
    "size 96": Case(RAGGED, key_size=96, value_size=96),
    "size 128": Case(RAGGED, key_size=128, value_size=128),
    "size 256": Case(RAGGED, key_size=256, value_size=256),
    "values of another size": Case(RAGGED, key_size=64, value_size=48),
    "window": Case(RAGGED, window=16),
    "window of one": Case(RAGGED, window=1),
    "wide window": Case(RAGGED, window=100),
    "scale": Case(RAGGED, scaling=0.3),
    "soft-cap": Case(RAGGED, scaling=1.0, softcap=2.5),
    "sinks": Case(RAGGED, has_sinks=True),
    "all at once": Case(
        RAGGED, heads=6, key_size=80, value_size=80, window=50, scaling=0.4, softcap=3.0, has_sinks=True
    ),
    "bfloat16": Case(RAGGED, dtype=torch.bfloat16),
    "float16": Case(RAGGED, dtype=torch.float16, window=50),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def _short_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short contexts as long ones would be."""
    monkeypatch.setattr(ragged, "_SHARE_TOKENS", 16)


def is_equal(case: Case, kernels: ModuleType) -> bool:
    """The check that mutants have to fail."""
    return distance(case, Ragged(kernels, PROGRAMS)) < TOLERANCE[case.dtype]


# Triton's interpreter computes with bfloat16 as if it were integers, and says so in its manual.
RUNS = [(name, language) for language in LANGUAGES for name in CASES if (name, language) != ("bfloat16", "triton")]


@pytest.mark.usefixtures("_short_shares")
@pytest.mark.parametrize(("name", "language"), RUNS)
def test_kernels_equal_attention_row_by_row(name: str, language: str) -> None:
    assert is_equal(CASES[name], LANGUAGES[language]())


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_long_past_is_cut_into_shares_and_a_short_one_is_not(language: str) -> None:
    kernels = Ragged(LANGUAGES[language](), PROGRAMS)
    assert (kernels._shares(2, 600), kernels._shares(2, 200), kernels._shares(40, 100_000)) == (2, 1, 1)
    assert kernels._shares(1, 100_000) == PROGRAMS
    assert distance(Case([600, 300]), kernels) < TOLERANCE[torch.float32]


# None of these writes, or reads much, where nothing of the sequence's is.
MUTANTS = {
    "one position too many": ("end = tl.minimum(begin + step, length)", "end = tl.minimum(begin + step, length + 1)"),
    "one position too few": ("- tl.load(place + 3) + 1, 0)", "- tl.load(place + 3), 0)"),
    "window off by one": ("length - window, 0)", "length - window - 1, 0)"),
    "another head's keys": ("+= kv_head * capacity * key_size", "+= 0 * capacity * key_size"),
    "another head's values": ("+= kv_head * capacity * value_size", "+= 0 * capacity * value_size"),
    "shares not lessened": ("lessened = tl.exp(largest - top)", "lessened = tl.exp(largest - largest)"),
    "blocks not lessened": ("lessened = tl.exp(largest - larger)", "lessened = tl.exp(larger - larger)"),
    "soft-cap doubled": ("scores = softcap * (2.0", "scores = softcap * (4.0"),
    "sinks forgotten": ("total += tl.exp(sink - top)", "total += 0.0 * tl.exp(sink - top)"),
    "scale forgotten": ("* scaling", "* 1.0"),
    "new key not written": ("tl.store(keys + dims, new,", "tl.store(keys + dims, new * 0.0,"),
    "new value not written": ("tl.store(values + dims, new,", "tl.store(values + dims, new * 0.0,"),
}


@pytest.mark.usefixtures("_short_shares")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail_the_check(name: str) -> None:
    old, new = MUTANTS[name]

    def mutate(source: str) -> str:
        assert source.count(old) == 1
        return source.replace(old, new)

    kernels = load_kernels(mutate)
    assert not all(is_equal(CASES[case], kernels) for case in ("lengths", "window", "all at once"))
