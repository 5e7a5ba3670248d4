"""Work that waits for the engine thread. The thread goes from one item to the next without asking the event loop, so
the engine is never idle while something waits, however busy the loop is with streams.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class EngineQueue(Generic[_Item, _Result]):
    """Runs `work` on each item in turn, on `thread`, and calls `done` or `failed` with what came of it, in the event
    loop that the queue was made in. After a failure nothing more is taken."""

    def __init__(
        self,
        thread: Executor,
        work: Callable[[_Item], _Result],
        done: Callable[[_Result], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._thread = thread
        self._work = work
        self._done = done
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # of everything below; held for a moment only
        self._waiting: deque[_Item] = deque()
        self._at_work = False
        self._closed = False

    def __len__(self) -> int:
        """Items that have not begun."""
        return len(self._waiting)

    def put(self, item: _Item) -> None:
        with self._lock:
            if self._closed:
                return
            self._waiting.append(item)
            if self._at_work:
                return
            self._at_work = True
        self._thread.submit(self._run)

    def close(self) -> None:
        """Forget what waits. What has begun goes on; whatever the thread is given next comes after it."""
        with self._lock:
            self._closed = True
            self._waiting.clear()

    def _run(self) -> None:
        try:
            while (item := self._take()) is not None:
                self._loop.call_soon_threadsafe(self._done, self._work(item))
        # Whatever this is, whoever waits for the item must learn that nothing comes.
        except BaseException as error:  # noqa: BLE001 - the boundary of a thread
            self.close()
            self._loop.call_soon_threadsafe(self._failed, error)

    def _take(self) -> _Item | None:
        with self._lock:
            if not self._waiting:
                self._at_work = False
                return None
            return self._waiting.popleft()
