"""`potluck models`: the options of its commands. What they do is `cluster.cli.stored_models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Look after the models on this machine's disk: what nodes fetched, and what the hub gave.",
    rich_markup_mode=None,
)

_Model = Annotated[str, typer.Argument(help="A model's name, or the beginning of its id.")]
_State = Annotated[
    Path | None,
    typer.Option("--state", envvar="POTLUCK_HOME", help="Where keys, hashes and weights are kept. [~/.potluck]"),
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, for scripts.")]
_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_models(None, False)


@app.command("list")
def list_models(state: _State = None, as_json: _Json = False) -> None:
    """Show what this machine's nodes hold on disk, and what was made of GGUF files."""
    from cluster.cli.running import run_command
    from cluster.cli.stored_models import list_command

    run_command(list_command, state, as_json)


@app.command("pull")
def pull_model(
    model: Annotated[str, typer.Argument(help="A hub id such as Qwen/Qwen3-8B.")],
    revision: _Revision = None,
    state: _State = None,
    as_json: _Json = False,
) -> None:
    """Download a hub model ahead of serving, and hash it, so that `serve` starts at once."""
    from cluster.cli.running import run_command
    from cluster.cli.stored_models import pull_command

    run_command(pull_command, model, revision, state, as_json)


@app.command("remove")
def remove_model(model: _Model, state: _State = None, as_json: _Json = False) -> None:
    """Remove a model from the stores of this machine's nodes, or what was made of a GGUF file.

    The hub's cache and your own files stay.
    """
    from cluster.cli.running import run_command
    from cluster.cli.stored_models import remove_command

    run_command(remove_command, model, state, as_json)


@app.command("verify")
def verify_model(model: _Model, state: _State = None, as_json: _Json = False) -> None:
    """Read what is on disk again and compare it with the model's hashes; exit code 1 when something is damaged.

    Damaged tensors are named, and fetched again at the next load. Of a model in the hub's cache, damaged files are.
    """
    from cluster.cli.running import run_command
    from cluster.cli.stored_models import verify_command

    run_command(verify_command, model, state, as_json)


@app.command("provenance")
def show_provenance(
    model: Annotated[str, typer.Argument(help="A model's name, the beginning of its id, a folder or a hub id.")],
    revision: _Revision = None,
    state: _State = None,
    as_json: _Json = False,
) -> None:
    """Show where a model came from: source, revision, licence and the hashes of its files."""
    from cluster.cli.provenance import provenance_command
    from cluster.cli.running import run_command

    run_command(provenance_command, model, revision, state, as_json)
