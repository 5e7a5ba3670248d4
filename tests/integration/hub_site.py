"""A hub on loopback and a machine with an empty cache, whose processes know the hub only by HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.hub_server import Hub, Repository, hub_server
from tests.weight_files import write_model

_ROOT = Path(__file__).parents[2]
COMMIT, NEXT_COMMIT = "1" * 40, "2" * 40
TENSOR_BYTES = 256 * 1024
WEIGHTS = "model-00001-of-00002.safetensors"

_CLIENT = """
import json, os, pathlib, sys
from cluster.errors import PotluckError
from coordinator.hub import resolve_model
progress = []
try:
    found = resolve_model(
        sys.argv[1],
        conversions=pathlib.Path(),
        progress=lambda *now: progress.append(now),
        hashes=pathlib.Path(os.environ["HF_HOME"], "hashes"),
    )
    said = {"folder": str(found.folder), "name": found.name, "revision": found.revision, "progress": progress}
except PotluckError as error:
    said = {"error": str(error), "kind": type(error).__name__}
print(json.dumps(said))
"""


@dataclass
class Site:
    """A hub with one model, and a machine with an empty cache."""

    hub: Hub
    model: Path
    home: Path

    @property
    def repository(self) -> Repository:
        return self.hub.repositories["org/tiny"]

    def start(self, model: str = "org/tiny", *, before: str = "", **environment: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name}
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", before + _CLIENT, model],
            cwd=_ROOT,
            env=kept | settings | {"HF_HUB_DOWNLOAD_TIMEOUT": "3"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def resolve(self, model: str = "org/tiny", *, before: str = "", **environment: str) -> dict[str, Any]:
        process = self.start(model, before=before, **environment)
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0, errors
        said: dict[str, Any] = json.loads(output)
        return said | {"log": errors}

    def wait_for_parts(self, size_bytes: int) -> None:
        """Wait until so much of unfinished files is on the disk."""
        parts = self.home / "hub" / "models--org--tiny" / "blobs"
        until = time.monotonic() + 30
        while sum(path.stat().st_size for path in parts.glob("*.incomplete")) < size_bytes:
            assert time.monotonic() < until
            time.sleep(0.05)


@contextmanager
def hub_site(folder: Path) -> Iterator[Site]:
    """With one model in two shards, beside which lies what nobody needs."""
    model = write_model(folder / "hub", tensor_bytes=TENSOR_BYTES, shards=2)
    (model / "pytorch_model.bin").write_bytes(bytes(1000))
    (model / "consolidated.safetensors").write_bytes(bytes(1000))
    with hub_server() as hub:
        hub.repositories["org/tiny"] = Repository(model, COMMIT)
        yield Site(hub, model, folder / "home")
