"""Opens MODEL beside a running event loop: finds it, downloads it where it is a hub id, converts it where it is a
GGUF file, reads and hashes its files.

All of that can take hours, and the endpoint answers meanwhile: progress is told on the loop. The work runs in threads
that nobody waits for at the end of the process, because a hub that is silent holds one for many seconds; whatever has
arrived is on the disk, and the next start goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from cluster.errors import ModelError, UsageError
from cluster.models.checkpoint import Checkpoint, open_checkpoint
from cluster.models.facts import ModelFacts, read_facts
from cluster.models.hashing import CountProgress
from cluster.models.manifest import Manifest, build_manifest
from cluster.placement import Ask
from coordinator.happenings import ModelOpened, Tell, Working
from coordinator.hub import (
    HubGguf,
    HubModel,
    ResolvedModel,
    find_model,
    parse_model,
    peek_model,
    resolve_model,
    work_on,
)
from coordinator.hub_hashes import check_names

_T = TypeVar("_T")

_PROGRESS_INTERVAL_S = 0.1
"""Pieces arrive thousands of times a second; nobody reads so fast."""


@dataclass(frozen=True, slots=True)
class WantedModel:
    """MODEL as typed."""

    text: str
    revision: str | None
    bits: int | None = None  # pack full-precision weights when they are loaded
    conversions_bytes_max: int | None = None  # all that is made of GGUF files together; None: a share of the disk


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model whose files have been read and hashed."""

    resolved: ResolvedModel
    checkpoint: Checkpoint
    facts: ModelFacts
    manifest: Manifest


async def open_model(wanted: WantedModel, ask: Ask, cache: Path, conversions: Path, tell: Tell) -> OpenModel:
    """Find MODEL, read its headers and hash its files; the hashes are remembered, so that this is long only once."""
    with _Work(tell) as work:
        early = await work.run(lambda: _peek(wanted, conversions))
        if early is not None:
            check_ask(ask, wanted.text, early)
            tell(ModelOpened(wanted.text, early))
        resolved = await work.run(
            lambda: resolve_model(
                wanted.text,
                conversions=conversions,
                revision=wanted.revision,
                progress=work.progress(work_on(wanted.text)),
                cancelled=work.cancelled,
                hashes=cache,
                conversions_bytes_max=wanted.conversions_bytes_max,
            )
        )
        checkpoint = await work.run(lambda: open_checkpoint(resolved.folder))
        facts = await work.run(lambda: read_facts(checkpoint, wanted.bits))
        check_ask(ask, resolved.name, facts)
        if early is None:
            tell(ModelOpened(resolved.name, facts))
        manifest = await work.run(
            lambda: build_manifest(
                checkpoint,
                name=resolved.name,
                revision=resolved.revision,
                source=resolved.source,
                cache=cache,
                progress=work.progress("reading the model"),
            )
        )
        if resolved.commit is not None:
            check_names(checkpoint.folder, manifest.files)
    return OpenModel(resolved, checkpoint, facts, manifest)


def _peek(wanted: WantedModel, conversions: Path) -> ModelFacts | None:
    """What is known of a model before it is downloaded, from its configuration and headers: what cannot be served is
    refused now, and not after hours. None for a model that is here, or is to be converted here."""
    if not isinstance(parse_model(wanted.text), HubModel | HubGguf):
        return None
    if find_model(wanted.text, conversions=conversions, revision=wanted.revision) is not None:
        return None
    from coordinator.hub_errors import Unreachable

    try:
        return read_facts(peek_model(wanted.text, revision=wanted.revision), wanted.bits)
    except Unreachable:
        return None  # the download is more patient, and says what is wrong


def check_ask(ask: Ask, name: str, facts: ModelFacts) -> None:
    """UsageError when no pool of machines could serve the model as asked."""
    if ask.context is not None and ask.context > facts.context_tokens:
        raise UsageError(
            f"--context {ask.context} is more than the {facts.context_tokens} tokens that {name} was made for"
        )
    if ask.stages_min > facts.layer_count:
        raise UsageError(
            f"{name} has {facts.layer_count} layers, so at most {facts.layer_count} nodes get one each; "
            f"--min-nodes asks for {ask.stages_min}"
        )


class _Work:
    """Blocking work of one opening. Leaving the block ends what still runs, as soon as that notices."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._latest: Working | None = None  # set by threads
        self.cancelled = threading.Event()

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancelled.set()

    async def run(self, function: Callable[[], _T]) -> _T:
        """Like asyncio.to_thread, but in a thread that does not keep the process alive."""
        done: asyncio.Future[_T] = self._loop.create_future()

        def work() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - carried over to whoever waits
                self._post(partial(_settle, done, error))
            else:
                self._post(partial(_settle, done, None, result))

        threading.Thread(target=work, name="opening the model", daemon=True).start()
        while not done.done():
            await asyncio.wait((done,), timeout=_PROGRESS_INTERVAL_S)
            self._tell_progress()
        return done.result()

    def progress(self, what: str) -> CountProgress:
        def on_progress(done_bytes: int, total_bytes: int) -> None:
            if self.cancelled.is_set():
                raise ModelError("opening the model was cancelled")  # ends the thread; nobody sees it
            self._latest = Working(what, done_bytes, total_bytes)

        return on_progress

    def _tell_progress(self) -> None:
        latest, self._latest = self._latest, None
        if latest is not None:
            self._tell(latest)

    def _post(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who would listen
            self._loop.call_soon_threadsafe(call)


def _settle(done: asyncio.Future[_T], error: BaseException | None, *result: _T) -> None:
    if done.cancelled():
        return  # nobody waits any more
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(*result)
