"""How far a fetch has come, told to whoever asked a few times a second."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

_REPORT_INTERVAL_S = 0.25
_RATE_WINDOW_S = 5.0  # long enough not to flicker, short enough to follow a link that slows down


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """`done_bytes` of the slice's `total_bytes` are here and `received_bytes` came over the network this time,
    lately at `rate_bytes_s`."""

    done_bytes: int
    total_bytes: int
    received_bytes: int
    rate_bytes_s: float


ProgressCallback = Callable[[FetchProgress], None]


class Meter:
    """Counts from any thread; reports on the event loop."""

    def __init__(self) -> None:
        self.done_bytes = 0
        self.total_bytes = 0
        self._lock = threading.Lock()

    def add_done(self, count: int) -> None:
        with self._lock:
            self.done_bytes += count

    @contextlib.asynccontextmanager
    async def reporting(self, progress: ProgressCallback, received: Callable[[], int]) -> AsyncIterator[None]:
        """Report at once, whenever something changed, and at the end if nothing failed."""
        clock = asyncio.get_running_loop().time
        samples = deque([(clock(), received())])

        def report() -> FetchProgress:
            now, count = clock(), received()
            samples.append((now, count))
            while len(samples) > 2 and samples[0][0] < now - _RATE_WINDOW_S:
                samples.popleft()
            (then, before) = samples[0]
            rate = (count - before) / (now - then) if now > then else 0.0
            current = FetchProgress(self.done_bytes, self.total_bytes, count, rate)
            progress(current)
            return current

        async def tick() -> None:
            last = report()
            while True:
                await asyncio.sleep(_REPORT_INTERVAL_S)
                if (self.done_bytes, self.total_bytes, received()) != (
                    last.done_bytes,
                    last.total_bytes,
                    last.received_bytes,
                ):
                    last = report()

        ticker = asyncio.create_task(tick())
        try:
            yield
            report()
        finally:
            ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticker
