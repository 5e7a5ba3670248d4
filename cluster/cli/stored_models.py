"""What `potluck models` does with the stores of this machine's nodes, and `pull`."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cluster.errors import ModelError, UserError
from cluster.models.card import printable
from cluster.models.checkpoint import open_checkpoint
from cluster.models.hashing import CountProgress, counting
from cluster.models.manifest import Manifest, build_manifest
from cluster.quantities import format_bytes
from cluster.state_dir import StateDir, default_state_path, holder_pid
from coordinator.gguf.shelf import Conversion, ConversionShelf
from coordinator.hub import ResolvedModel, find_model, resolve_model, work_on
from coordinator.hub_hashes import has_digest, is_digest
from coordinator.server import conversions_folder, coordinator_state
from node.weights.inventory import StoredModel, checked_bytes, damaged, forget, stored_models

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@.+)?", re.ASCII)
_ID_BEGINNING = re.compile(r"[0-9a-f]{6,64}")


def list_command(state: Path | None, as_json: bool) -> int:
    root = state or default_state_path()
    models, conversions = stored_models(root), ConversionShelf(conversions_folder(state)).everything()
    if as_json:
        made = [
            {
                "name": conversion.name,
                "folder": str(conversion.folder),
                "bytes": conversion.size_bytes,
                "whole": conversion.is_whole,
                "last_used": _date(conversion.last_used_ns),
            }
            for conversion in conversions
        ]
        return answer({"models": [_document(model) for model in models], "converted": made})
    for conversion in conversions:
        how_far = "" if conversion.is_whole else " left to remove" if conversion.is_leftover else " so far"
        say(
            f"{conversion.name}  {format_bytes(conversion.size_bytes)}{how_far}  converted  "
            f"last used {_date(conversion.last_used_ns)}  in {conversion.folder}"
        )
    if not models:
        say(f"No node's store at or below {root} holds a model yet; nodes fetch what a coordinator serves.")
    for model in models:
        document = _document(model)
        in_place = f"used in place from {document['in_place']}"
        stored = f"{document['complete_tensors']} of {document['tensors']} tensors"
        say(
            f"{document['name']}  {model.store.model[:12]}  {format_bytes(model.size_bytes)}  "
            f"{in_place if document['in_place'] else stored}  last used {document['last_used']}  in {model.state}"
        )
    return 0


def pull_command(text: str, revision: str | None, state: Path | None, as_json: bool) -> int:
    with progress(work_on(text), as_json) as on_progress:
        conversions = conversions_folder(state)
        hashes = coordinator_state(state or default_state_path()) / "hashes"
        found = resolve_model(text, conversions=conversions, revision=revision, progress=on_progress, hashes=hashes)
    manifest = hashed(found, state, as_json)
    document = {"folder": str(found.folder), "name": found.name, "revision": found.revision, "id": manifest.id}
    if as_json:
        return answer(document)
    say(f"{found.name} at {found.revision} is in {found.folder}; next: potluck serve {text}")
    return 0


def remove_command(text: str, state: Path | None, as_json: bool) -> int:
    converted = _remove_conversions(text, state)
    models = matching(text, state) if not converted else ()
    removed: list[dict[str, object]] = [{"folder": str(c.folder), "bytes": c.size_bytes} for c in converted]
    for model in models:
        if pid := holder_pid(model.state):
            raise UserError(f"the node of process {pid} uses {model.state}; stop it first, then remove the model")
        with StateDir(model.state):
            model.store.delete()
        removed.append({"id": model.store.model, "state": str(model.state), "bytes": model.size_bytes})
    if as_json:
        return answer({"removed": removed})
    for conversion in converted:
        say(f"removed {conversion.folder}: {format_bytes(conversion.size_bytes)}")
    for model in models:
        say(f"removed {_name(model)} from {model.state}: {format_bytes(model.size_bytes)}")
    return 0


def _remove_conversions(text: str, state: Path | None) -> tuple[Conversion, ...]:
    """Remove what was made of the GGUF file that `text` names, with its suffix or without."""
    shelf = ConversionShelf(conversions_folder(state))
    meant = tuple(c for c in shelf.everything() if text.removesuffix(".gguf") in (c.name, c.folder.name))
    user = coordinator_state(state or default_state_path())
    if meant and (pid := holder_pid(user)):
        raise UserError(f"the coordinator of process {pid} uses {user}; stop it first, then remove the model")
    with shelf.alone() if meant else contextlib.nullcontext():
        for conversion in meant:
            if not shelf.remove(conversion):
                raise UserError(f"another process uses {conversion.folder}; stop it first, then remove the model")
    return meant


def verify_command(text: str, state: Path | None, as_json: bool) -> int:
    try:
        models = matching(text, state)
    except ModelError:
        cached = find_model(text, conversions=conversions_folder(state)) if _HUB_ID.fullmatch(text) else None
        if cached is None:
            raise
        return _verify_cached(cached, as_json)
    results: list[dict[str, object]] = []
    found_damage = False
    for model in models:
        total_bytes = checked_bytes(model)
        with progress(f"reading {_name(model)}", as_json) as on_progress:
            bad = damaged(model, counting(total_bytes, on_progress))
        fetched_again = _have_fetched_again(model, bad)
        found_damage = found_damage or bool(bad)
        results.append(
            {"id": model.store.model, "state": str(model.state), "tensors": len(model.complete), "damaged": list(bad)}
        )
        if not as_json:
            say(f"{_name(model)} in {model.state}: {len(model.complete)} tensors read, {len(bad)} damaged")
            for name in bad:
                say(f"  damaged: {printable(name)}")
            if bad:
                say("  fetched again at the next load" if fetched_again else "  stop the node that uses it, and repeat")
    if as_json:
        answer({"verified": results})
    return int(found_damage)


def _verify_cached(cached: ResolvedModel, as_json: bool) -> int:
    """A model in the hub's cache: its files are called by their hash there, so nothing else is needed. Files from
    mirrors that tell no hashes are called by something else, and cannot be checked."""
    blobs = {path.name: path.resolve() for path in sorted(cached.folder.iterdir()) if path.is_file()}
    hashed_blobs = {name: blob for name, blob in blobs.items() if is_digest(blob.name)}
    unchecked = sorted(blobs.keys() - hashed_blobs.keys())
    with progress(f"reading {cached.name}", as_json) as on_progress:
        advance = counting(sum(blob.stat().st_size for blob in hashed_blobs.values()), on_progress)
        bad = [name for name, blob in hashed_blobs.items() if not has_digest(blob, blob.name, advance)]
    if as_json:
        found = {"folder": str(cached.folder), "files": len(hashed_blobs), "damaged": bad, "unchecked": unchecked}
        answer({"verified": [found]})
    else:
        say(f"{cached.name} in {cached.folder}: {len(hashed_blobs)} files read, {len(bad)} damaged")
        for name in bad:
            say(f"  damaged: {printable(name)}; remove {blobs[name]} and pull the model again")
        if unchecked:
            say(f"  not checked, because the hub told no hash: {', '.join(map(printable, unchecked))}")
    return int(bool(bad))


def _have_fetched_again(model: StoredModel, bad: tuple[str, ...]) -> bool:
    """A running node's journal is its own; it finds out at its next load only what this wrote before it began."""
    if not bad or holder_pid(model.state) is not None:
        return False
    with StateDir(model.state):
        forget(model, bad)
    return True


def matching(text: str, state: Path | None) -> tuple[StoredModel, ...]:
    """The stored models that `text` names; ModelError when there is none."""
    root = state or default_state_path()
    everything = stored_models(root)
    models = tuple(model for model in everything if _is_meant(model, text))
    if not models:
        known = sorted({_name(model) for model in everything})
        raise ModelError(
            f"no node's store at or below {root} holds {text}"
            + (f"; there is {', '.join(known)}" if known else "")
            + ". Models in the hub's cache are shared with other programs: see `hf cache`"
        )
    return models


def _is_meant(model: StoredModel, text: str) -> bool:
    if _ID_BEGINNING.fullmatch(text) and model.store.model.startswith(text):
        return True
    return model.manifest is not None and text in (model.manifest.name, model.manifest.source)


def hashed(found: ResolvedModel, state: Path | None, as_json: bool) -> Manifest:
    """The model's manifest. The coordinator's memory of hashes is used and filled."""
    cache = coordinator_state(state or default_state_path()) / "hashes"
    with progress(f"hashing {found.name}", as_json) as on_progress:
        return build_manifest(
            open_checkpoint(found.folder),
            name=found.name,
            revision=found.revision,
            source=found.source,
            cache=cache,
            progress=on_progress,
        )


def _name(model: StoredModel) -> str:
    return printable(model.manifest.name) if model.manifest else model.store.model[:12]


def _document(model: StoredModel) -> Mapping[str, object]:
    used_ns = model.store.last_used_ns()
    return {
        "name": _name(model),
        "id": model.store.model,
        "revision": model.manifest.revision if model.manifest else "",
        "bytes": model.size_bytes,
        "tensors": len(model.manifest.tensors) if model.manifest else 0,
        "complete_tensors": len(model.complete),
        "in_place": str(in_place) if (in_place := model.store.in_place()) else None,
        "last_used": _date(used_ns) if used_ns else "never",
        "state": str(model.state),
        "damaged": model.manifest is None,
    }


def _date(used_ns: int) -> str:
    return datetime.fromtimestamp(used_ns // 10**9, UTC).isoformat()


# -- Output ----------------------------------------------------------------------------------------------


def say(line: str) -> None:
    Console(highlight=False, soft_wrap=True).print(line, markup=False)


def answer(document: Mapping[str, object]) -> int:
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


@contextlib.contextmanager
def progress(what: str, as_json: bool) -> Iterator[CountProgress]:
    """A bar on standard error, where that is a terminal and no script is reading."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done_bytes, total_bytes: bars.update(task, completed=done_bytes, total=total_bytes)
