"""One child per device: restarted when it crashes, not when its arguments are wrong, gone when told to stop."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from node import supervisor

_COUNTS = """
import pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
with log.open("a") as file:
    file.write("started\\n")
if sys.argv[2] == "crash" and len(log.read_text().splitlines()) < 3:
    sys.exit(1)
if sys.argv[2] == "usage":
    sys.exit(2)
def stop(*_):
    log.open("a").write("stopped\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
time.sleep(60)
"""


def command(log: Path, how: str) -> list[str]:
    return [sys.executable, "-c", _COUNTS, str(log), how]


async def until(log: Path, lines: list[str]) -> None:
    async with asyncio.timeout(20):
        while not log.exists() or log.read_text().splitlines() != lines:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.05)


def test_a_crash_is_followed_by_a_new_start_and_stop_reaches_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_RESTART_S", 0.05)
    log = tmp_path / "log"

    async def scenario() -> int:
        stop = asyncio.Event()
        task = asyncio.create_task(supervisor.supervise(command(log, "crash"), "n", stop))
        await until(log, ["started"] * 3)
        await asyncio.sleep(0.2)  # lets the third install its handler
        stop.set()
        return await asyncio.wait_for(task, 20)

    assert asyncio.run(scenario()) == 0
    assert log.read_text().splitlines() == ["started", "started", "started", "stopped"]


def test_a_wrong_argument_is_not_tried_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = asyncio.run(asyncio.wait_for(supervisor.supervise(command(log, "usage"), "n", asyncio.Event()), 20))
    assert (code, log.read_text()) == (2, "started\n")
