"""Checkpoints and torch references, made once for all tests of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.integer_checkpoints import quantised_checkpoint
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, decisive_reference

TOLERANCE = 5e-4
"""Largest allowed difference of two float32 logits. They are about 10 wide: 5e-5 of that, some ten times the
rounding that another order of summation causes, and at most a twentieth of any reference's top-two gap."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The float32 checkpoint of a family; read only."""

    @cache
    def make(family: str) -> Path:
        return make_checkpoint(family, tmp_path_factory.mktemp(family))

    return make


@pytest.fixture(scope="session")
def whole_model(checkpoint: Callable[[str], Path]) -> Callable[[str], WholeModel]:
    """The same checkpoint as `transformers` runs it."""

    @cache
    def make(family: str) -> WholeModel:
        return WholeModel(checkpoint(family))

    return make


@pytest.fixture(scope="session")
def reference(whole_model: Callable[[str], WholeModel]) -> Callable[..., Reference]:
    """A decisive greedy continuation by the whole model of a prompt with so many tokens."""

    @cache
    def make(family: str, prompt_tokens: int = 40) -> Reference:
        model = whole_model(family)
        return decisive_reference(model, prompt_tokens=prompt_tokens, count=LAST_TOKENS + 4, tolerance=TOLERANCE)

    return make


@pytest.fixture(scope="session")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Reference]]:
    """A checkpoint of a family in a layout of integers, read only, and a continuation by `transformers` with the same
    weights dequantised."""

    @cache
    def make(family: str, layout: str) -> tuple[Path, Reference]:
        folder = make_checkpoint(family, tmp_path_factory.mktemp("integers") / family, layers=3)
        packed, unpacked = quantised_checkpoint(folder, layout)
        model = WholeModel(unpacked)
        return packed, decisive_reference(model, prompt_tokens=40, count=LAST_TOKENS, tolerance=TOLERANCE)

    return make


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A checkpoint of a family as `mlx_lm.convert` writes it, and the same numbers as transformers stores them; read
    only."""
    from tests.converted import convert, unconverted

    @cache
    def make(
        family: str, bits: int | None = 4, mode: str = "affine", group: int = 32, **others: object
    ) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(f"{family}_converted")
        wide = {"hidden_size": 2 * group} if group > 32 else {}  # groups have to divide it
        plain = make_checkpoint(family, folder / "plain", **(wide | others))  # type: ignore[arg-type]
        packed = convert(plain, folder / "packed", bits=bits, group=group, mode=mode)
        return packed, unconverted(packed, folder / "unpacked")

    return make


@pytest.fixture(scope="session")
def unpacked_answer(converted: Callable[..., tuple[Path, Path]]) -> Callable[..., Reference]:
    """A decisive continuation by `transformers` of the same numbers in full precision."""

    @cache
    def make(
        family: str, prompt_tokens: int = 40, bits: int | None = 4, mode: str = "affine", group: int = 32
    ) -> Reference:
        whole = WholeModel(converted(family, bits, mode, group)[1])
        return decisive_reference(whole, prompt_tokens=prompt_tokens, count=LAST_TOKENS, tolerance=TOLERANCE)

    return make
