"""Work that waits for the engine thread. The thread goes from one item to the next without asking the event loop, which
only gets a moment to send what was computed; so the engine works while something waits, however busy the loop is.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, Generic, TypeVar

HEAD_START_S: Final = 0.005
"""How long the thread waits at most for a result to be on its way before it begins with the next item: what it computes
next is of no use to a stage that has nothing to do. An engine that is busy in Python holds the interpreter, which the
loop needs several times to send something (measured beside other work: 7 ms without this, 3 with it)."""

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
        head_start_s: float = HEAD_START_S,
    ) -> None:
        self._thread = thread
        self._work = work
        self._done = done
        self._failed = failed
        self._head_start_s = head_start_s
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # of everything below; held for a moment only
        self._waiting: deque[_Item] = deque()
        self._at_work = False
        self._closed = False
        self._is_taken = threading.Event()  # the latest result

    def __len__(self) -> int:
        """Items that have not begun."""
        return len(self._waiting)

    @property
    def next(self) -> _Item | None:
        """The item that `work` is given after the one that it has; None when nothing waits."""
        with self._lock:
            return self._waiting[0] if self._waiting else None

    def put(self, item: _Item) -> None:
        with self._lock:
            if self._closed:
                return
            self._waiting.append(item)
            if self._at_work:
                return
            self._at_work = True
        self._thread.submit(self._run)

    def taken(self) -> None:
        """The latest result is on its way; the thread need not give way to the loop any longer."""
        self._is_taken.set()

    def close(self) -> None:
        """Forget what waits. What has begun goes on; whatever the thread is given next comes after it."""
        with self._lock:
            self._closed = True
            self._waiting.clear()

    def _run(self) -> None:
        try:
            while (item := self._take()) is not None:
                result = self._work(item)
                self._is_taken.clear()
                self._loop.call_soon_threadsafe(self._done, result)
                if self._waiting:
                    self._is_taken.wait(self._head_start_s)
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
