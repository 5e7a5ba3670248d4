"""What MODEL on the command line means: the built-in model, a folder, or a model on the Hugging Face hub.

Owns that decision and its errors; a text that is meant as a path never reaches the network. The download itself
is `coordinator.hub_download`, imported only when it is needed.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint, open_checkpoint
from cluster.models.hashing import CountProgress

LOCAL_REVISION = "local"

_HUB_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?", re.ASCII
)
_WEIGHT_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pth", ".pt", ".json")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model's folder on this machine, what to call it, and which version it is."""

    folder: Path
    name: str
    revision: str  # a commit of the hub, or "local"
    source: str  # where it came from, for people: an address on the hub, or the folder


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub; `revision` is a branch, tag or commit, None for the default branch."""

    repository: str
    revision: str | None


def resolve_model(
    text: str,
    *,
    revision: str | None = None,
    progress: CountProgress | None = None,
    cancelled: threading.Event | None = None,
) -> ResolvedModel:
    """Find MODEL, downloading it where it is a hub id. Blocks: call it in a thread, and set `cancelled` to have it
    end soon with a ModelError. A broken-off download goes on where it was the next time."""
    match parse_model(text):
        case Path() as folder:
            # The built-in model's folder is an implementation detail of where Potluck is installed.
            name = "demo" if text == "demo" else folder.name
            return ResolvedModel(folder, name, LOCAL_REVISION, "built in" if text == "demo" else str(folder))
        case HubModel(repository, named):
            from coordinator.hub_download import address, download

            wanted = revision or named
            folder, commit = download(repository, wanted, progress, cancelled or threading.Event())
            return ResolvedModel(folder, repository, commit, address(repository))


def find_model(text: str, *, revision: str | None = None) -> ResolvedModel | None:
    """MODEL as far as it lies on this machine; None for a hub id that was not downloaded. Asks no network."""
    match parse_model(text):
        case Path():
            return resolve_model(text)
        case HubModel(repository, named):
            from coordinator.hub_download import address, find_cached

            found = find_cached(repository, revision or named or "main")
            return ResolvedModel(found[0], repository, found[1], address(repository)) if found else None


def peek_model(text: str, *, revision: str | None = None) -> Checkpoint:
    """What MODEL is made of, without its weights: of a hub id only the configuration and headers are read."""
    match parse_model(text):
        case Path() as folder:
            return open_checkpoint(folder)
        case HubModel(repository, named):
            from coordinator.hub_headers import peek

            return peek(repository, revision or named)


def parse_model(text: str) -> Path | HubModel:
    """What `text` means, decided by looking at this machine's disk alone."""
    if text == "demo":
        from coordinator.builtin import demo_model_path

        return demo_model_path()
    if "://" in text or text.startswith(("hf.co/", "huggingface.co/")):
        raise ModelError(f"{text} is a web address; write a hub model as org/name, such as Qwen/Qwen3-8B")
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path.resolve()
    if path.is_file():
        raise ModelError(f"{text} is a file; give the folder that it lies in, with config.json and *.safetensors")
    match = _HUB_ID.fullmatch(text)
    if match is None or text.endswith(_WEIGHT_SUFFIXES):
        hint = "" if "/" in text else f"; a model on the hub is written org/name, the built-in one is demo, not {text}"
        raise ModelError(f"there is no folder {path.absolute()}{hint}")
    if Path(text).parent.is_dir():
        # models/lama beside an existing folder models: a typing error is likelier than an organisation of that name.
        raise ModelError(
            f"there is no folder {path.absolute()}, though there is {path.absolute().parent}. "
            f"If you mean {match['id']} on the hub, start Potluck in another folder"
        )
    return HubModel(match["id"], match["revision"])
