"""`potluck bench`: how fast is an endpoint, ours or anybody's, for how many users at once?

Owns: what is asked, of whom and in which order. The asking is `bench_endpoint` and `bench_client`, the arithmetic
`bench_measures`, the showing `bench_report`.
"""

from __future__ import annotations

import os
import re
import secrets
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
_SEEDS = 1 << 31
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
    seed: int | None  # of the prompts; caches remember those of an earlier run
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
    if command.plot is not None and not command.plot.parent.is_dir():
        raise UsageError(f"expected --plot in a folder that exists, found {command.plot}")
    urls = [("potluck", command.url), *(_named(text) for text in command.against)]
    if len({name for name, _ in urls}) < len(urls):
        raise UsageError("two endpoints of one name; expected --against NAME=URL with a name of its own for each")
    seed = secrets.randbelow(_SEEDS) if command.seed is None else command.seed
    keys = {name: os.environ.get(_key_variable(name if place else "")) for place, (name, _) in enumerate(urls)}
    endpoints = [(name, Endpoint(url, key=keys[name])) for name, url in urls]
    targets = [Target(name, urlsplit(each.url), each.chat_model(), keys[name]) for name, each in endpoints]
    benches = [BenchedEndpoint(target, seed=seed, timeout_s=command.timeout_s) for target in targets]
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

    try:
        run_async(work())
    finally:  # also of a run that was stopped, what was measured counts
        if table is not None and results:
            table.end()
        if command.as_json and results:
            sys.stdout.write(bench_report.document(results, seed) + "\n")
        if command.plot is not None and results:
            command.plot.write_text(bench_report.page(results), encoding="utf-8")
            console.print(f"The plot is {command.plot}", markup=False)
    return 1 if any(result.problems for result in results) else 0


def _key_variable(name: str) -> str:
    """Where the key of an endpoint of this name is looked for; of the one without a name, ours."""
    suffix = re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_")
    return f"{_KEY_VARIABLE}_{suffix}" if suffix else _KEY_VARIABLE


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
