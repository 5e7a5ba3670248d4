"""Real clusters to measure: `potluck serve` and `potluck join` as processes, every node on a core of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.cli.bench_client import Target
from cluster.cli.bench_endpoint import BenchedEndpoint
from cluster.cli.endpoint import Endpoint
from cluster.errors import ClusterError
from tests.bench.cores import client_cores, node_core, pinned
from tests.bench.model import Form, model_folder
from tests.integration.live import joined, new_cluster, serving

START_S = 300.0
"""Hashing and loading 0.7 GB beside whatever else the machine does."""

CONTEXT, USERS = 5120, 4
"""A promise that holds the longest prompt of the table, and thirty-two short sequences at once."""

MEMORY = "4GiB"

ANSWER_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Arm:
    """Something that answers, and how its layers are cut: [first, last) of each stage; empty where nobody tells."""

    name: str
    endpoint: BenchedEndpoint
    stages: tuple[tuple[int, int], ...]

    def status(self) -> Mapping[str, Any]:
        found = self.endpoint.status()
        if found is None:
            raise ClusterError(f"{self.name} does not tell of itself any more")
        return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs: an address of the machine, and the words before a command that run it there."""

    host: str = "127.0.0.1"
    words: tuple[str, ...] = ()


@contextlib.contextmanager
def cluster_arm(
    name: str,
    form: Form,
    places: Sequence[Place],
    state: Path,
    *,
    backend: str = "torch",
    device: str = "cpu",
    memory: str = MEMORY,
    serve: Sequence[str] = (),
) -> Iterator[Arm]:
    """A cluster with a node in each place, the coordinator beside the first, given the words `serve` too; ready when it
    is handed over."""
    cluster, everywhere = new_cluster(), client_cores()
    with_us = ("--exit-with", str(os.getpid()))  # however this process ends
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                joined(
                    f"node-{index}",
                    backend,
                    cluster,
                    state / f"{name}-node-{index}",
                    *("--no-mdns", "--device", device, *with_us),
                    memory=memory,
                    host=place.host,
                    prefix=(*place.words, *pinned([node_core(index)])),
                    env={"OMP_NUM_THREADS": "1"},
                )
            )
            for index, place in enumerate(places)
        ]
        peers = [word for child in children for word in ("--peer", str(child.wait_for("up", START_S)["addresses"][0]))]
        packing = () if form.bits is None else ("--bits", str(form.bits))
        coordinator = stack.enter_context(
            serving(
                model_folder(form.shape),
                cluster,
                state / f"{name}-coordinator",
                *("--no-local-node", "--no-mdns", *with_us, "--min-nodes", str(len(places)), *peers, *packing, *serve),
                context=CONTEXT,
                users=USERS,
                cluster_host=places[0].host,
                prefix=pinned(everywhere),
            )
        )
        coordinator.wait_ready(START_S)
        arm = asked(name, coordinator.url)
        stages = arm.status()["plan"]["stages"]
        if len(stages) != len(places):
            raise ClusterError(f"expected a stage on each of {len(places)} nodes, found {len(stages)}")
        yield Arm(arm.name, arm.endpoint, tuple((s["first_layer"], s["last_layer"]) for s in stages))


def asked(name: str, url: str) -> Arm:
    """An arm by the address of its OpenAI endpoint; it is asked a few questions to warm it up."""
    endpoint = BenchedEndpoint(
        Target(name, urlsplit(url), Endpoint(url).chat_model(), None), seed=0, timeout_s=ANSWER_TIMEOUT_S
    )
    asyncio.run(endpoint.prepare())
    return Arm(name, endpoint, ())
