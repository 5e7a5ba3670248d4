"""The models that this coordinator serves, whole, as a source of weights for its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.models.manifest import Manifest, to_json
from cluster.types import ModelId
from cluster.weight_service import WeightService, pack_bits

_STREAMS_MAX = 64
"""Sixteen nodes with four streams each. The next one is told to come back; nodes do."""


@dataclass(frozen=True, slots=True)
class _WholeModel:
    """A Holding of everything."""

    manifest_json: bytes
    folder: Path
    sizes: Mapping[str, int]  # of the files that may be read, by name
    tensor_count: int

    def size_bytes(self, file: str) -> int | None:
        return self.sizes.get(file)

    def holds(self, file: str, begin: int, end: int) -> bool:
        return 0 <= begin <= end <= self.sizes.get(file, 0)

    def tensors(self) -> bytes:
        return pack_bits([True] * self.tensor_count)


class WeightServer(WeightService):
    """The coordinator's Weights service."""

    def __init__(self, streams_max: int = _STREAMS_MAX) -> None:
        self._models: dict[str, _WholeModel] = {}
        super().__init__(self._models.get, streams_max)

    def add(self, manifest: Manifest, folder: Path) -> None:
        """Serve the model that `manifest` was made of, from `folder`."""
        sizes = {entry.name: entry.size_bytes for entry in manifest.files}
        self._models[manifest.id] = _WholeModel(to_json(manifest), folder, sizes, len(manifest.tensors))

    def remove(self, model: ModelId) -> None:
        self._models.pop(model, None)
