"""All models on this node's disk: which are here, when each was last used, and which go when room is needed.

    <state>/models/<model id>/    one model each (node.weights.store)
    <state>/hashes/               what is remembered of folders elsewhere (cluster.models.hashing)

Owns the limit and the order in which models go. Knows nothing of layers or of where bytes come from. But for
`loading`, everything blocks: call it in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import ModelError
from cluster.models.manifest import TensorRecord
from cluster.quantities import format_bytes
from cluster.types import ModelId
from node.weights.disk import free_bytes, margin_bytes, writing
from node.weights.store import MODEL_ID, Store

_log = logging.getLogger(__name__)

_LIMIT_SHARE = 0.8
"""Of the disk's size, unless a limit is given: a machine lent to a cluster still needs its disk for its owner."""


class Shelf:
    """The models below one state folder. One process at a time has it: the state's lock sees to that."""

    def __init__(self, state: Path, limit_bytes: int | None = None) -> None:
        self.models = state / "models"
        self.hashes = state / "hashes"
        self.loading = asyncio.Lock()  # a load that is being cancelled still writes for a moment
        self._limit_bytes = limit_bytes
        self._stores: dict[ModelId, Store] = {}
        self._lock = threading.Lock()

    def limit_bytes(self) -> int:
        """What all models together may take."""
        if self._limit_bytes is not None:
            return self._limit_bytes
        with writing(self.models):
            self.models.mkdir(parents=True, exist_ok=True)
            return int(shutil.disk_usage(self.models).total * _LIMIT_SHARE)

    def store(self, model: ModelId) -> Store:
        """The one store of `model` in this process, so that whoever serves it sees what a load just brought."""
        with self._lock:
            if model not in self._stores:
                self._stores[model] = Store(self.models, model)
            return self._stores[model]

    def stores(self) -> tuple[Store, ...]:
        """Every model that is here, the least recently used first."""
        if not self.models.is_dir():
            return ()
        names = sorted(path.name for path in self.models.iterdir() if MODEL_ID.fullmatch(path.name))
        return tuple(sorted((self.store(ModelId(name)) for name in names), key=lambda store: store.last_used_ns()))

    def remove(self, store: Store) -> None:
        with self._lock:
            self._stores.pop(store.model, None)
        store.delete()

    def make_room(self, store: Store, wanted: Sequence[TensorRecord], wanted_bytes: int, needed_bytes: int) -> None:
        """Make `needed_bytes` more fit into the limit and onto the disk, for the `wanted` tensors of `store`, which
        take `wanted_bytes` in all. Other models go first, the least recently used first of all; then what else of
        this model is here. Nothing goes where all of that were not enough."""
        limit_bytes = self.limit_bytes()
        if wanted_bytes > limit_bytes:
            raise ModelError(
                f"the weights of this node's layers take {format_bytes(wanted_bytes)}, but at most "
                f"{format_bytes(limit_bytes)} may lie in {self.models}: {format_bytes(wanted_bytes - limit_bytes)} too "
                "little. Start this node with a higher --weights-max, or with --state on a larger disk"
            )
        others = [other for other in self.stores() if other is not store]
        spare_bytes = store.unwanted_bytes(wanted) + sum(allocated_bytes(other.root) for other in others)
        missing_bytes = self._missing_on_disk_bytes(needed_bytes)
        if missing_bytes > spare_bytes:
            raise ModelError(
                f"the weights of this node's layers need {format_bytes(needed_bytes)} on the disk of {self.models}, "
                f"which would be {format_bytes(missing_bytes - spare_bytes)} too little even without the "
                f"{format_bytes(spare_bytes)} of other weights there. Free some space there, or start this node with "
                "--state on a larger disk"
            )
        going = iter(others)
        while self._missing_bytes(needed_bytes, limit_bytes) > 0:
            victim = next(going, None)
            if victim is None:
                store.keep_only(wanted)
                return
            _log.warning("removing %s from %s to make room", victim.label(), self.models)
            self.remove(victim)

    def _missing_bytes(self, needed_bytes: int, limit_bytes: int) -> int:
        """Room still to be made; at most 0 when there is enough."""
        over_limit = sum(allocated_bytes(path) for path in self.models.iterdir()) + needed_bytes - limit_bytes
        return max(over_limit, self._missing_on_disk_bytes(needed_bytes))

    def _missing_on_disk_bytes(self, needed_bytes: int) -> int:
        return needed_bytes + margin_bytes(needed_bytes) - free_bytes(self.models) if needed_bytes else 0


def allocated_bytes(folder: Path) -> int:
    """What `folder` really takes on its disk: holes take nothing."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(Path(place) / name).st_blocks * 512
            except FileNotFoundError:
                continue  # removed meanwhile
    return total
