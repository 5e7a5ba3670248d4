"""Lets an engine begin with what has arrived of its slice, while the rest is still under way.

A fetch says on the event loop what came; an engine waits in its own thread for the tensors that it is about to read.
Knows neither files nor networks.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import ClusterError, PotluckError


class Arrival:
    """One slice that arrives. Made on the event loop, of which all but `wait_for` are called."""

    def __init__(self) -> None:
        self._folder: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
        self._changed = threading.Condition()
        self._here: set[str] = set()
        self._late: set[str] = set()
        self._awaited: set[str] = set()
        self._error: PotluckError | None = None
        self.complete = False

    def begin(self, folder: Path, here: Iterable[str], late: Iterable[str]) -> None:
        """`folder` can be opened; the tensors `here` are in it, and those that are `late` will be."""
        self._late = set(late)
        self.came(here)
        self._folder.set_result(folder)

    def came(self, names: Iterable[str]) -> None:
        """These tensors are in their files, and right."""
        with self._changed:
            self._here.update(names)
            self._changed.notify_all()

    def end(self, folder: Path) -> None:
        """Everything is here."""
        with self._changed:
            self.complete = True
            self._changed.notify_all()
        if not self._folder.done():
            self._folder.set_result(folder)

    def fail(self, error: BaseException) -> None:
        """No more will come. Whoever waits is told."""
        ours = error if isinstance(error, PotluckError) else ClusterError(f"the weights did not arrive: {error!r}")
        with self._changed:
            self._error = ours
            self._changed.notify_all()
        if not self._folder.done():
            self._folder.set_exception(ours)
            self._folder.exception()  # it may be that nobody waits any more

    async def folder(self) -> Path:
        """The folder, as soon as an engine can open it."""
        return await asyncio.shield(self._folder)

    def wait_for(self, names: Iterable[str]) -> None:
        """Return once all these tensors are here; raise what keeps them from coming. Called by the engine's thread."""
        wanted = set(names)
        with self._changed:
            self._awaited |= wanted
            self._changed.wait_for(lambda: self.complete or self._error is not None or wanted <= self._here)
            if self._error is not None:
                raise self._error

    def check_awaited(self) -> None:
        """An engine that reads a tensor without waiting for it reads zeros, which nothing else would tell."""
        forgotten = sorted(self._late - self._awaited)
        assert not forgotten, f"the engine did not wait for {', '.join(forgotten[:3])}"
