"""`potluck bench`: how fast is an endpoint, ours or anybody's, for how many users at once?

Owns: what is asked, of whom and in which order. The asking is `bench_endpoint` and `bench_client`, the arithmetic
`bench_measures`, the showing `bench_report`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from cluster.cli import bench_report
from cluster.cli.bench_client import Target
from cluster.cli.bench_endpoint import BenchedEndpoint
from cluster.cli.bench_measures import Load, Result
from cluster.cli.endpoint import Endpoint
from cluster.cli.running import run_async
from cluster.errors import UsageError

_KEY_VARIABLE = "POTLUCK_BENCH_KEY"
_LOADS_MAX = 64  # more than anybody waits for


@dataclass(frozen=True, slots=True)
class BenchCommand:
    """The options as typed."""

    url: str
    against: tuple[str, ...]  # NAME=URL
    users: str
    prompt: str
    output: str
    rounds: int
    timeout_s: float
    seed: int
    plot: Path | None
    as_json: bool


def bench_command(command: BenchCommand) -> int:
    loads = [
        Load(users, prompt, output, command.rounds)
        for prompt in _numbers("--prompt", command.prompt)
        for output in _numbers("--output", command.output)
        for users in _numbers("--users", command.users)
    ]
    if len(loads) > _LOADS_MAX:
        raise UsageError(f"these are {len(loads)} combinations; leave some of --users, --prompt or --output out")
    if command.plot is not None and command.plot.suffix != ".html":
        raise UsageError(f"expected --plot FILE.html, found {command.plot}")
    endpoints = [("potluck", command.url), *(_named(text) for text in command.against)]
    if len({name for name, _ in endpoints}) < len(endpoints):
        raise UsageError("two endpoints of one name; expected --against NAME=URL with a name of its own for each")
    benches = [
        BenchedEndpoint(_target(name, url), seed=command.seed, timeout_s=command.timeout_s) for name, url in endpoints
    ]
    results: list[Result] = []
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    table = None if command.as_json else bench_report.Table(Console(highlight=False))

    async def work() -> None:
        for bench in benches:
            console.print(f"{bench.target.name}: {bench.target.model} at {bench.target.url.geturl()}", markup=False)
            await bench.prepare()
        for load in loads:
            for bench in benches:  # side by side, so that what else the machine does meets all alike
                results.append(await bench.run(load))
                if table is not None:
                    table.add(results[-1])

    run_async(work())
    if table is not None:
        table.end()
    if command.plot is not None:
        command.plot.write_text(bench_report.page(results), encoding="utf-8")
        console.print(f"The plot is {command.plot}", markup=False)
    if command.as_json:
        sys.stdout.write(bench_report.document(results) + "\n")
    return 1 if any(result.problems for result in results) else 0


def _target(name: str, url: str) -> Target:
    key = os.environ.get(_KEY_VARIABLE)
    endpoint = Endpoint(url, key=key)
    return Target(name, urlsplit(endpoint.url), endpoint.chat_model(), key)


def _named(text: str) -> tuple[str, str]:
    name, separator, url = text.partition("=")
    if not name or not separator or not url:
        raise UsageError(f"expected --against NAME=URL, such as llama.cpp=http://127.0.0.1:8080, found {text!r}")
    return name, url


def _numbers(option: str, text: str) -> Sequence[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 1_000_000 for part in parts):
        raise UsageError(f"expected {option} as numbers from 1, such as 1,4,16, found {text!r}")
    return [int(part) for part in dict.fromkeys(parts)]
