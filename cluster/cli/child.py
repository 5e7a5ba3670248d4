"""A `potluck` command as a child process that reports in JSON lines: how the demo and the tests run real clusters."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.cli.serve import potluck_command
from cluster.errors import ClusterError

_POLL_S = 0.5

_STOP_S = 15.0
"""A child that has not ended this long after SIGTERM is stuck."""


class Process:
    """A child that reports in JSON lines; everything it prints is kept for the case that it fails."""

    def __init__(
        self, name: str, arguments: Sequence[str], *, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._child = subprocess.Popen(
            [*prefix, *potluck_command(*arguments, "--json")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C reaches us alone, and we stop it once, politely
            env=None if env is None else {**os.environ, **env},
        )
        self._said: list[str] = []
        self._events: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name=f"read-{name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as lines:
            for line in lines:
                self._said.append(line)
                if line.startswith('{"event"'):
                    self._events.put(json.loads(line))
        self._events.put(None)

    def wait_for(self, event: str, timeout_s: float, needs: Sequence[Process] = ()) -> Mapping[str, Any]:
        """The next event of this kind. ClusterError, with what was said, when it takes too long, or when this process
        or one that it `needs` ends before."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                found = self._events.get(timeout=min(left_s, _POLL_S))
            except queue.Empty:
                for process in needs:
                    if process.exit_code is not None:
                        raise ClusterError(f"the {process.name} ended. It said:\n{process.output()[-2000:]}") from None
                continue
            if found is None:
                raise ClusterError(f"the {self.name} ended before {event!r}. It said:\n{self._tail()}")
            if found["event"] == event:
                return found
        raise ClusterError(f"the {self.name} did not come to {event!r} in {timeout_s:.0f} s. It said:\n{self._tail()}")

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._child.poll()

    def output(self) -> str:
        """Everything it has printed so far."""
        return "".join(self._said)

    def _tail(self) -> str:
        return "".join(self._said[-20:])

    def stop(self) -> None:
        """End it by its process id: politely, then not."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._reader.join(_STOP_S)  # ends with the last process that inherited the pipe


@contextlib.contextmanager
def running(
    name: str, arguments: Sequence[str], *, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """The process for as long as the block runs. `prefix` goes before the command, such as `ip netns exec NAME`."""
    process = Process(name, arguments, prefix=prefix, env=env)
    try:
        yield process
    finally:
        process.stop()
