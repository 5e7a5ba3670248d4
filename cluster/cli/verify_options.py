"""`potluck verify`: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli import options as opt


def verify(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a GGUF file, a hub id or `demo`; without it, what --url serves: from the hub at the commit "
            "that is served, or a folder or file that lies in the same place on this machine.",
        ),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="How many stages, or engines with their layers: torch:0-5,mlx:6-11. [2]")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Engine of each stage, such as torch,mlx; one name is for all.")
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=2, help="Length of the test input.")] = 48,
    bits: opt.Bits = None,
    wire_bits: Annotated[
        str | None,
        typer.Option(
            "--wire-bits", metavar="8", help="Also chain the stages as `serve --wire-bits 8` does, and show the error."
        ),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="Verify the plan that this endpoint runs.")] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="What is computed now is right; compare with it from now on.")
    ] = False,
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """Prove that every stage and layer computes what the single-process library computes.

    Runs in this process: the reference model is held whole, so it must fit this machine. What each layer made of a
    fixed input is remembered for this model, hardware and these versions, so that the next run, perhaps after an
    update of a library or driver, tells which layers have moved. Exit code 1: something is wrong; 3: all is within
    tolerance, but a layer has moved by more than rounding.
    """
    from cluster.cli.running import run_command
    from cluster.cli.verify import VerifyCommand, verify_command

    run_command(
        verify_command, VerifyCommand(model, stages, backend, tokens, bits, wire_bits, url, accept, state, as_json)
    )
