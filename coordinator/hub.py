"""What MODEL on the command line means: the built-in model, a folder, a GGUF file, or a model on the Hugging Face hub.

Owns that decision and its errors; a text that is meant as a path never reaches the network. The download itself
is `coordinator.hub_download`, and making a folder of a GGUF file `coordinator.gguf`; both are imported only when they
are needed.
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
    r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?:/(?P<gguf>[A-Za-z0-9][\w.-]{0,190}\.gguf))?(?:@(?P<revision>[\w./-]{1,200}))?",
    re.ASCII,
)
_GGUF = ".gguf"
_WEIGHT_SUFFIXES = (_GGUF, ".safetensors", ".bin", ".pth", ".pt", ".json")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model's folder on this machine, what to call it, and which version it is."""

    folder: Path
    name: str
    revision: str  # a commit of the hub, or "local"
    source: str  # where it came from, for people: an address on the hub, or the folder
    text: str  # the MODEL that means it wherever it is typed on this machine, but for the revision

    @property
    def commit(self) -> str | None:
        """The commit of the hub that its files are of; None for what came from no hub."""
        return None if self.revision == LOCAL_REVISION else self.revision


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file on this machine, or the first one of a set."""

    path: Path


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub; `revision` is a branch, tag or commit, None for the default branch."""

    repository: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class HubGguf:
    """A GGUF file on the hub, or one of a set."""

    repository: str
    file: str
    revision: str | None


Meant = Path | GgufModel | HubModel | HubGguf


def resolve_model(
    text: str,
    *,
    conversions: Path,
    revision: str | None = None,
    progress: CountProgress | None = None,
    cancelled: threading.Event | None = None,
    hashes: Path | None = None,
    conversions_bytes_max: int | None = None,
) -> ResolvedModel:
    """Find MODEL, downloading it where it is a hub id, and converting it where it is a GGUF file (once, into a folder
    below `conversions`, where others make room for it). Blocks: call it in a thread, and set `cancelled` to have it end
    soon with a ModelError. What was broken off goes on where it was the next time. A download remembers tensors' hashes
    in `hashes`."""
    match parse_model(text):
        case Path() as folder:
            # The built-in model's folder is an implementation detail of where Potluck is installed.
            if text == "demo":
                return ResolvedModel(folder, "demo", LOCAL_REVISION, "built in", "demo")
            return ResolvedModel(folder, folder.name, LOCAL_REVISION, str(folder), str(folder))
        case GgufModel(path):
            from coordinator.gguf.store import ConversionStore

            folder = ConversionStore(conversions, conversions_bytes_max).use(path, progress, cancelled)
            return _converted(folder, path)
        case HubModel(repository, named):
            from coordinator.hub_download import address, download

            wanted = revision or named
            folder, commit = download(repository, wanted, progress, cancelled or threading.Event(), hashes)
            return ResolvedModel(folder, repository, commit, address(repository), repository)
        case HubGguf(repository, gguf, named):
            from coordinator.gguf.store import ConversionStore
            from coordinator.hub_download import address, download

            stop = cancelled or threading.Event()
            there, commit = download(repository, revision or named, progress, stop, gguf=gguf)
            folder = ConversionStore(conversions, conversions_bytes_max).use(there / gguf, progress, stop)
            return _fetched(folder, repository, gguf, commit, address(repository))


def find_model(text: str, *, conversions: Path, revision: str | None = None) -> ResolvedModel | None:
    """MODEL as far as it lies on this machine; None for a hub id that was not downloaded, and a GGUF file that was not
    converted. Asks no network."""
    match parse_model(text):
        case Path():
            return resolve_model(text, conversions=conversions)
        case GgufModel(path):
            from coordinator.gguf.store import ConversionStore

            made = ConversionStore(conversions).find(path)
            return _converted(made, path) if made else None
        case HubModel(repository, named):
            from coordinator.hub_download import address, find_cached

            found = find_cached(repository, revision or named or "main")
            return ResolvedModel(found[0], repository, found[1], address(repository), repository) if found else None
        case HubGguf(repository, gguf, named):
            from coordinator.gguf.store import ConversionStore
            from coordinator.hub_download import address, find_cached

            if (found := find_cached(repository, revision or named or "main", gguf)) is None:
                return None
            made = ConversionStore(conversions).find(found[0] / gguf)
            return _fetched(made, repository, gguf, found[1], address(repository)) if made else None


def peek_model(text: str, *, revision: str | None = None) -> Checkpoint:
    """What MODEL is made of, without its weights: of a hub id only the configuration and headers are read."""
    match parse_model(text):
        case Path() as folder:
            return open_checkpoint(folder)
        case GgufModel(path):
            from coordinator.gguf.layout import lay_out
            from coordinator.gguf.source import open_gguf

            return lay_out(open_gguf(path)).checkpoint()
        case HubModel(repository, named):
            from coordinator.hub_headers import peek

            return peek(repository, revision or named)
        case HubGguf(repository, gguf, named):
            from coordinator.hub_headers import peek_gguf

            return peek_gguf(repository, revision or named, gguf)


def work_on(text: str) -> str:
    """What finding MODEL takes, for progress."""
    match parse_model(text):
        case GgufModel(path):
            return f"converting {path.name}"
        case HubGguf():
            return f"downloading and converting {text}"
        case Path() | HubModel():
            return f"downloading {text}"


def _converted(folder: Path, path: Path) -> ResolvedModel:
    from coordinator.gguf.source import model_name

    return ResolvedModel(folder, model_name(path.name), LOCAL_REVISION, str(path), str(path))


def _fetched(folder: Path, repository: str, gguf: str, commit: str, address: str) -> ResolvedModel:
    from coordinator.gguf.source import model_name

    return ResolvedModel(folder, f"{repository}/{model_name(gguf)}", commit, address, f"{repository}/{gguf}")


def parse_model(text: str) -> Meant:
    """What `text` means, decided by looking at this machine's disk alone."""
    if text == "demo":
        from coordinator.builtin import demo_model_path

        return demo_model_path()
    if "://" in text or text.startswith(("hf.co/", "huggingface.co/")):
        raise ModelError(f"{text} is a web address; write a hub model as org/name, such as Qwen/Qwen3-8B")
    path = Path(text).expanduser()
    if text and path.is_dir():
        return _in_folder(path.resolve())
    if path.is_file() and path.suffix == _GGUF:
        return GgufModel(path.resolve())
    if path.is_file():
        raise ModelError(
            f"{text} is a file; give the folder that it lies in, with config.json and *.safetensors, or a {_GGUF} file"
        )
    match = _HUB_ID.fullmatch(text)
    if match is None or (match["gguf"] is None and text.endswith(_WEIGHT_SUFFIXES)):
        hint = "" if "/" in text else f"; a model on the hub is written org/name, the built-in one is demo, not {text}"
        raise ModelError(f"there is no folder {path.absolute()}{hint}")
    if any(parent.is_dir() for parent in [*Path(text).parents][:-1]):
        # models/lama beside an existing folder models: a typing error is likelier than an organisation of that name.
        raise ModelError(
            f"there is no folder {path.absolute()}, though there is {path.absolute().parent}. "
            f"If you mean {match['id']} on the hub, start Potluck in another folder"
        )
    if match["gguf"]:
        return HubGguf(match["id"], match["gguf"], match["revision"])
    return HubModel(match["id"], match["revision"])


def _in_folder(folder: Path) -> Path | GgufModel:
    """A folder of GGUF files is the model in them, unless the same model lies beside it as Potluck stores it."""
    if any(folder.glob("*.safetensors")) or not any(folder.glob(f"*{_GGUF}")):
        return folder
    from coordinator.gguf.source import find_gguf

    found = find_gguf(folder)
    return GgufModel(found) if found else folder
