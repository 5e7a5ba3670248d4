"""How `potluck verify` cuts a model: evenly, as written on the command line, or as a running cluster has cut it.

Knows nothing of devices; which one of this machine computes for an engine is `cluster.cli.verify`'s to choose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.errors import ClusterError, UsageError
from cluster.models.facts import ModelFacts
from cluster.types import Backend, LayerRange

_STAGE = re.compile(r"(?P<backend>torch|mlx):(?P<first>\d{1,5})-(?P<last>\d{1,5})")


@dataclass(frozen=True, slots=True)
class Cut:
    """The layers of one stage; `backend` is None where this machine chooses."""

    layers: LayerRange
    backend: Backend | None = None


@dataclass(frozen=True, slots=True)
class RunningPlan:
    """What a cluster serves, and how it has cut it."""

    source: str  # the MODEL that means it on the coordinator's machine
    revision: str | None  # its commit, if it is of the hub
    cuts: tuple[Cut, ...]
    devices: tuple[str, ...]  # of the stages' nodes, such as `cuda:0`
    bits: int | None  # what full-precision weights are packed in at load


def parse_stages(text: str) -> int | tuple[Cut, ...]:
    """A number of stages, or `torch:0-5,mlx:6-11`: an engine for each run of layers, both ends included, as every
    table of ours shows them."""
    if text.strip().isdecimal() and int(text) >= 1:
        return int(text)
    cuts = []
    for part in text.split(","):
        match = _STAGE.fullmatch(part.strip())
        if match is None or int(match["last"]) < int(match["first"]):
            raise UsageError(f"expected --stages as a number or such as torch:0-5,mlx:6-11, found {text!r}")
        cuts.append(Cut(LayerRange(int(match["first"]), int(match["last"]) + 1), Backend(match["backend"])))
    return tuple(cuts)


def parse_backends(text: str, stages: int) -> tuple[Backend, ...]:
    """The engine of each stage, the names repeated in order; empty for `auto`."""
    if text.strip() == "auto":
        return ()
    names = [name.strip() for name in text.split(",")]
    known = {backend.value for backend in Backend}
    if not set(names) <= known:
        raise UsageError(f"expected --backend auto, or names from {', '.join(sorted(known))}, found {text!r}")
    if len(names) > stages:
        raise UsageError(f"--backend {text} names {len(names)} engines for --stages {stages}")
    return tuple(Backend(names[stage % len(names)]) for stage in range(stages))


def even_cut(facts: ModelFacts, stages: int) -> tuple[LayerRange, ...]:
    """Stages of about as many layers each, cut only where the model can be."""
    cuts = sorted(facts.legal_cuts | {0})
    if stages > len(cuts):
        raise UsageError(f"--stages {stages} is more than this model can be cut into: it has {len(cuts)} layers")
    begins = [cuts[stage * len(cuts) // stages] for stage in range(stages)]
    return tuple(LayerRange(first, last) for first, last in pairwise((*begins, facts.layer_count)))


def check_cuts(facts: ModelFacts, cuts: Sequence[Cut], whose: str) -> None:
    """Every layer once, in order, each stage beginning where the model can be cut."""
    owned = [layer for cut in cuts for layer in cut.layers]
    if owned != list(range(facts.layer_count)):
        given = ", ".join(str(cut.layers) for cut in cuts)
        raise UsageError(f"{whose} gives layers {given}; expected each of 0-{facts.layer_count - 1} once, in order")
    for cut in cuts[1:]:
        if cut.layers.first not in facts.legal_cuts:
            legal = ", ".join(map(str, sorted(facts.legal_cuts)))
            raise UsageError(f"{whose} begins a stage at layer {cut.layers.first}; this model can be cut at {legal}")


def read_plan(status: Mapping[str, object]) -> RunningPlan:
    """The plan in a status document; ClusterError where there is none or it makes no sense."""
    plan, model, nodes = status.get("plan"), status.get("model"), status.get("nodes")
    if not isinstance(plan, dict) or not isinstance(model, dict) or not isinstance(nodes, list):
        raise ClusterError(f"the cluster has no plan yet, it is {status.get('phase')}; see `potluck status`")
    try:
        device_of = {node["name"]: str(node["device"]) for node in nodes}
        cuts = [
            Cut(LayerRange(int(stage["first_layer"]), int(stage["last_layer"])), Backend(stage["backend"]))
            for stage in plan["stages"]
        ]
        devices = [device_of.get(stage["node"], "") for stage in plan["stages"]]
        bits = None if model["bits"] is None else int(model["bits"])
        revision = None if model["revision"] is None else str(model["revision"])
        return RunningPlan(str(model["source"]), revision, tuple(cuts), tuple(devices), bits)
    except (KeyError, TypeError, ValueError) as error:
        raise ClusterError(
            "the endpoint's status does not say which model it serves and which layers are where; is it a Potluck?"
        ) from error
