"""One model, its references and one pool of nodes for all tests of real clusters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.discovery import multicast_works
from cluster.interfaces import choose_interfaces, read_interfaces
from tests.checkpoints import make_checkpoint
from tests.integration.live import Coordinator, Pool, has_backend, processes_of

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from tests.integration.answers import Served
    from tests.integration.hostile import Stage


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The float32 checkpoint of a family; read only."""
    pytest.importorskip("torch", reason="the checkpoints are made with transformers: the extra [torch]")

    @cache
    def make(family: str) -> Path:
        return make_checkpoint(family, tmp_path_factory.mktemp(f"model-{family}"), layers=6)

    return make


@pytest.fixture(scope="session")
def mdns() -> bool:
    """Whether nodes on loopback can be discovered; where not, tests name their addresses."""
    return asyncio.run(multicast_works(choose_interfaces(read_interfaces(), "127.0.0.1"), timeout_s=5.0))


@pytest.fixture(scope="package")
def pool(tmp_path_factory: pytest.TempPathFactory, mdns: bool) -> Iterator[Pool]:
    """Nodes that one coordinator after the other uses. All have ended afterwards."""
    with contextlib.ExitStack() as stack:
        made = Pool(tmp_path_factory.mktemp("pool"), mdns, stack)
        yield made
    assert not processes_of(made.cluster)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The model that `mixed` serves, and what it says; read only."""
    pytest.importorskip("torch", reason="the checkpoints are made with transformers: the extra [torch]")
    from tests.integration.answers import make_served

    return make_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def mixed(served: Served, pool: Pool) -> Iterator[Coordinator]:
    """Three nodes, of both engines where both are installed."""
    names = ("torch-a", "mlx-a", "torch-b") if has_backend("mlx") else ("torch-a", "torch-b", "torch-c")
    with pool.serving(served.folder, names) as made:
        yield made


@pytest.fixture(scope="module")
def stages(mixed: Coordinator, pool: Pool) -> list[Stage]:
    """The stages of `mixed`, as who attacks them knows them."""
    from tests.integration.hostile import stages_of

    return stages_of(mixed, pool)


@pytest.fixture
def unharmed(mixed: Coordinator, served: Served, stages: list[Stage]) -> Iterator[None]:
    """Whatever the test does, others are answered."""
    from tests.integration.hostile import unharmed_by

    with unharmed_by(mixed, served, stages):
        yield
