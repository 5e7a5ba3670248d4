"""How every command runs: its event loop, its signals, its exit code, its log.

Exit code 0 for success, 1 for failure, 2 for a wrong argument; Ctrl-C and SIGTERM stop everything cleanly.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import ParamSpec

import typer
from rich.console import Console

from cluster.errors import PotluckError, UsageError

_P = ParamSpec("_P")
_PARENT_CHECK_S = 1.0


def set_up_logging(verbose: bool) -> None:
    """Warnings always, to standard error; everything else on request. gRPC's own chatter stays silent."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )


def run_command(command: Callable[_P, int], *args: _P.args, **kwargs: _P.kwargs) -> None:
    """Run `command` and end the process with its exit code; our own errors become one line, not a traceback."""
    try:
        code = command(*args, **kwargs)
    except UsageError as error:
        _complain(error)
        code = 2
    except PotluckError as error:
        _complain(error)
        code = 1
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)


def _complain(error: PotluckError) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"potluck: {error}", markup=False)


def command_name() -> str:
    """How a person starts this very installation from here: `potluck`, or its path where that is not on the PATH."""
    own = Path(sys.executable).parent / "potluck"
    found = shutil.which("potluck")
    if not own.exists() or (found and Path(found).resolve() == own.resolve()):
        return "potluck"
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)


def run_until_stopped(work: Callable[[asyncio.Event], Coroutine[None, None, None]]) -> int:
    """Run `work(stop)` on uvloop. SIGINT and SIGTERM set `stop`; a second one ends the process at once."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if stop.is_set():
                os._exit(1)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        await work(stop)

    run_async(main())
    return 0


async def stop_with_parent(parent: int | None, stop: asyncio.Event) -> None:
    """A process that another one of ours started ends with it, even when that one is killed."""
    if parent is None:
        return
    while os.getppid() == parent:  # noqa: ASYNC110 - no event tells of a parent's death
        await asyncio.sleep(_PARENT_CHECK_S)
    stop.set()


def run_async(work: Coroutine[None, None, None]) -> None:
    """Run to completion on uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)
