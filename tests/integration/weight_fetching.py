"""How tests of transfers fetch a slice of a small model, in this process or in one of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.models.manifest import TensorRecord
from cluster.transport import Credentials
from cluster.types import LayerRange
from node.weights.fetch import SliceRequest, ensure_slice
from node.weights.meter import FetchProgress
from node.weights.shelf import Shelf
from tests.integration.weight_roles import LAYERS, Coordinator
from tests.weight_files import write_model

TENSOR_BYTES = 256 * 1024
MIDDLE = LayerRange(2, 4)


def transfer_model(folder: Path) -> Path:
    """In three files, so that a slice lies in several."""
    return write_model(folder, layers=LAYERS, tensor_bytes=TENSOR_BYTES, shards=3)


async def fetch_slice(
    coordinator: Coordinator,
    state: Path | Shelf,
    layers: LayerRange = MIDDLE,
    local_folder: Path | None = None,
    stall_s: float = 20.0,
) -> tuple[Path, FetchProgress]:
    seen: list[FetchProgress] = []
    shelf = state if isinstance(state, Shelf) else Shelf(state)
    channel = Credentials().channel(coordinator.address)
    request = SliceRequest(coordinator.manifest.id, layers, LAYERS, local_folder)
    try:
        folder = await ensure_slice(
            request, shelf=shelf, channel=channel, progress=seen.append, stall_timeout_s=stall_s
        )
    finally:
        await channel.close()
    assert seen[-1].done_bytes == seen[-1].total_bytes
    return folder, seen[-1]


def owned_by_slice(coordinator: Coordinator, model: Path, layers: LayerRange = MIDDLE) -> list[TensorRecord]:
    names = {tensor.name for tensor in owned_tensors(open_checkpoint(model), layers, LAYERS)}
    return [tensor for tensor in coordinator.manifest.tensors if tensor.name in names]


def bytes_of(folder: Path, tensor: TensorRecord) -> bytes:
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.begin)
        return file.read(tensor.size_bytes)


def fetch_command(coordinator: Coordinator, state: Path, *flags: str) -> list[str]:
    arguments = (coordinator.address, coordinator.manifest.id, str(MIDDLE.first), str(MIDDLE.last), str(state))
    return [sys.executable, "-m", "tests.integration.fetch_role", *arguments, *flags]
