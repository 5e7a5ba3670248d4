"""A node's fetch as a process of its own: `python -m tests.integration.fetch_role ADDRESS MODEL FIRST LAST STATE`.

Prints one JSON line for each attempt. With `--fill` the disk of STATE is filled up when the first bytes have
arrived, and emptied again before a second attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

from cluster.errors import PotluckError
from cluster.transport import Credentials
from cluster.types import LayerRange, ModelId
from node.weights.fetch import SliceRequest, ensure_slice
from node.weights.meter import FetchProgress
from node.weights.shelf import Shelf
from tests.integration.weight_roles import LAYERS


async def _attempt(address: str, request: SliceRequest, state: Path, filler: Path | None) -> dict[str, object]:
    last: list[FetchProgress] = []

    def progress(now: FetchProgress) -> None:
        last[:] = [now]
        if filler is not None and now.received_bytes > 100_000 and not filler.exists():
            _fill(filler)

    channel = Credentials().channel(address)
    try:
        folder = await ensure_slice(request, shelf=Shelf(state), channel=channel, progress=progress)
    except PotluckError as error:
        return {"error": str(error), "kind": type(error).__name__}
    finally:
        await channel.close()
    return {"folder": str(folder), "received_bytes": last[0].received_bytes}


def _fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def main(address: str, model: str, first: str, last: str, state: str, *flags: str) -> None:
    request = SliceRequest(ModelId(model), LayerRange(int(first), int(last)), LAYERS, None)
    filler = Path(state) / "filler" if "--fill" in flags else None
    sys.stdout.write(json.dumps(asyncio.run(_attempt(address, request, Path(state), filler))) + "\n")
    if filler is not None:
        filler.unlink()
        sys.stdout.write(json.dumps(asyncio.run(_attempt(address, request, Path(state), None))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
