"""One child process for each device of this machine, restarted when it crashes: a GPU fault takes down one node
and nothing else. Knows how to start a child, not what it does."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence

_log = logging.getLogger(__name__)

_RESTART_S = 1.0
_RESTART_MAX_S = 30.0
_STEADY_S = 60.0
"""A child that lived this long is restarted at once; one that keeps dying, ever more slowly."""

_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Nodes never ask a hub, so a child is not given what the user's shell may hold for the coordinator."""

_STOP_S = 10.0
"""A child gets this long to withdraw its advertisement and free its device before it is killed."""


async def supervise(command: Sequence[str], name: str, stop: asyncio.Event, stdout: int | None = None) -> int:
    """Run `command` until `stop` is set, or it ends with a usage error (exit code 2), which no restart cures.
    Returns the last exit code."""
    wait_s = _RESTART_S
    while True:
        began = time.monotonic()
        # In a session of its own: Ctrl-C reaches us alone, and we stop it once, politely.
        env = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        child = await asyncio.create_subprocess_exec(*command, start_new_session=True, stdout=stdout, env=env)
        code = await _until_over(child, stop)
        if stop.is_set():
            return code
        if code == 2:
            _log.warning("node %s cannot run with these options, so it is not started again", name)
            return code
        if time.monotonic() - began > _STEADY_S:
            wait_s = _RESTART_S
        _log.warning("node %s ended with exit code %d; it is started again in %.0f s", name, code, wait_s)
        try:
            await asyncio.wait_for(stop.wait(), wait_s)
            return code
        except TimeoutError:
            wait_s = min(wait_s * 2, _RESTART_MAX_S)


async def _until_over(child: asyncio.subprocess.Process, stop: asyncio.Event) -> int:
    ended = asyncio.create_task(child.wait())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            child.terminate()
            done, _ = await asyncio.wait((ended,), timeout=_STOP_S)
            if not done:
                child.kill()
        return await ended
    finally:
        stopping.cancel()
        if child.returncode is None:
            child.kill()
