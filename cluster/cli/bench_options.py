"""`potluck bench`: its options. What they do is `cluster.cli.bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import options as opt


def bench(
    url: opt.Url = opt.DEFAULT_URL,
    users: Annotated[str, typer.Option(metavar="N,...", help="How many ask at the same time.")] = "1,4,16",
    prompt: Annotated[str, typer.Option(metavar="TOKENS,...", help="Lengths of the prompts.")] = "100",
    output: Annotated[str, typer.Option(metavar="TOKENS,...", help="Lengths of the answers.")] = "128",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often each user asks, one after the other.")] = 2,
    against: Annotated[
        list[str] | None, typer.Option(metavar="NAME=URL", help="Another OpenAI endpoint to measure in the same run.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that one answer may take.")] = 600.0,
    seed: Annotated[int | None, typer.Option(help="Of the random prompts; every run has its own without.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with plots.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Measure an endpoint, ours or anybody's: how soon and how fast answers come, for how many users at once.

    Every combination of --users, --prompt and --output is measured on every endpoint, side by side. The prompts are
    random words, so that no cache has seen them, unless a --seed is used again. Keys come from the environment:
    POTLUCK_BENCH_KEY, and POTLUCK_BENCH_KEY_LLAMA_CPP for --against llama.cpp=URL. What was measured before Ctrl-C is
    written as well.

    \b
    Examples:
      potluck bench                                         1, 4 and 16 users
      potluck bench --users 1 --prompt 2000 --output 16     how long until the first token?
      potluck bench --against llama.cpp=http://127.0.0.1:8080 --plot compare.html
    """
    from cluster.cli.bench import BenchCommand, bench_command
    from cluster.cli.running import run_command

    run_command(
        bench_command,
        BenchCommand(
            url=url,
            against=tuple(against or ()),
            users=users,
            prompt=prompt,
            output=output,
            rounds=rounds,
            timeout_s=timeout_s,
            seed=seed,
            plot=plot,
            as_json=as_json,
        ),
    )
