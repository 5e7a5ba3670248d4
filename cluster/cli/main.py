"""`potluck`: the commands and their options. Each imports what it runs only when it runs, so `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster import __version__
from cluster.cli.models import app as models_app

app = typer.Typer(
    name="potluck",
    help="Pool the machines on your network into one endpoint for large language models.\n\n"
    "Start with `potluck demo`. Then: `potluck serve MODEL` here, `potluck join` on every other machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

app.add_typer(models_app, name="models")

_State = Annotated[
    Path | None,
    typer.Option("--state", envvar="POTLUCK_HOME", help="Where keys, hashes and weights are kept. [~/.potluck]"),
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, for scripts.")]
_Url = Annotated[str, typer.Option("--url", help="The endpoint to talk to.")]
_Cluster = Annotated[str, typer.Option("--cluster", help="Nodes and coordinators of one cluster find each other.")]
_Users = Annotated[int, typer.Option("--users", min=1, max=256, help="Answers of full length at the same time.")]
_Context = Annotated[str, typer.Option("--context", help="Longest prompt plus answer in tokens, or auto.")]
_ExitWith = Annotated[int | None, typer.Option(hidden=True, help="End when this parent process ends.")]
_DEFAULT_URL = "http://127.0.0.1:8000"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"potluck {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more, to standard error.")] = False,
) -> None:
    from cluster.cli.running import set_up_logging

    set_up_logging(verbose)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A folder, a hub id such as Qwen/Qwen3-8B, or `demo`.")],
    host: Annotated[str, typer.Option(help="Address of the HTTP endpoint.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTTP endpoint; 0 picks one.")] = 8000,
    cluster: _Cluster = "default",
    no_local_node: Annotated[bool, typer.Option("--no-local-node", help="Do not compute on this machine.")] = False,
    min_nodes: Annotated[
        int, typer.Option(min=0, help="Wait for this many nodes and give each of at least so many a stage.")
    ] = 0,
    context: _Context = "auto",
    users: _Users = 4,
    exclude: Annotated[list[str] | None, typer.Option(help="Do not use the node of this name.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="HOST:PORT of a node that mDNS does not reach.")] = None,
    no_mdns: Annotated[bool, typer.Option("--no-mdns", help="Do not look for nodes with mDNS.")] = False,
    cluster_host: Annotated[str, typer.Option(help="Address that nodes reach. [every interface]")] = "",
    cluster_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port for `join --coordinator`; another is taken when it is in use.")
    ] = 7433,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    exit_with: _ExitWith = None,
    state: _State = None,
    as_json: _Json = False,
) -> None:
    """Serve MODEL to every OpenAI client, computed by all nodes of the cluster.

    A node on this machine takes part unless --no-local-node. The endpoint answers from the start: /health at
    once, /ready with 200 as soon as a real token came out.
    """
    from cluster.cli.running import run_command
    from cluster.cli.serve import ServeCommand, serve_command

    run_command(
        serve_command,
        ServeCommand(
            model=model,
            revision=revision,
            host=host,
            port=port,
            cluster=cluster,
            local_node=not no_local_node,
            min_nodes=min_nodes,
            context=context,
            users=users,
            exclude=tuple(exclude or ()),
            peers=tuple(peer or ()),
            mdns=not no_mdns,
            cluster_host=cluster_host,
            cluster_port=cluster_port,
            state=state,
            exit_with=exit_with,
            as_json=as_json,
        ),
    )


@app.command()
def join(
    name: Annotated[str | None, typer.Option(help="What this node is called. [this machine's name]")] = None,
    cluster: _Cluster = "default",
    backend: Annotated[str, typer.Option(help="auto, torch or mlx.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda[:N][,...], mps or metal.")] = "auto",
    memory: Annotated[str | None, typer.Option(help="Use at most this much, such as 8GiB.")] = None,
    reserve: Annotated[str | None, typer.Option(help="Keep this share for whoever works here. [15%]")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine. [all cores]")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. [every interface]")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks one.")] = 0,
    coordinator: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of a coordinator that mDNS does not reach.")
    ] = None,
    no_mdns: Annotated[bool, typer.Option("--no-mdns", help="Do not advertise with mDNS.")] = False,
    weights_max: Annotated[
        str | None, typer.Option(help="Keep at most this much of models on disk, such as 200GiB. [80% of the disk]")
    ] = None,
    exit_with: _ExitWith = None,
    state: _State = None,
    as_json: _Json = False,
) -> None:
    """Offer this machine to a cluster, and wait to be used.

    The node advertises itself with mDNS; where that does not work, name the coordinator with --coordinator.
    Several devices (--device cuda:0,cuda:1) become one supervised node each.
    """
    from cluster.cli.join import JoinCommand, join_command
    from cluster.cli.running import run_command

    run_command(
        join_command,
        JoinCommand(
            name=name,
            cluster=cluster,
            backend=backend,
            device=device,
            memory=memory,
            reserve=reserve,
            threads=threads,
            host=host,
            port=port,
            coordinators=tuple(coordinator or ()),
            mdns=not no_mdns,
            state=state,
            weights_max=weights_max,
            exit_with=exit_with,
            as_json=as_json,
        ),
    )


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTTP endpoint; 0 picks one.")] = 0,
    question: Annotated[str, typer.Option(help="What to ask.")] = "What is Potluck?",
) -> None:
    """Three nodes on this machine, one built-in model, one answer: see it work.

    Starts real processes that find each other over mDNS, each with a memory budget that could not hold the
    model alone; prints the plan, streams an answer, and shows where each token's time went.
    """
    from cluster.cli.demo import demo_command
    from cluster.cli.running import run_command

    run_command(lambda: demo_command(keep=keep, port=port, question=question))


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a hub id or `demo`; without it: what fits here.")
    ] = None,
    cluster: _Cluster = "default",
    min_nodes: Annotated[int, typer.Option(min=0, help="Give each of at least so many nodes a stage.")] = 0,
    context: _Context = "auto",
    users: _Users = 4,
    peer: Annotated[list[str] | None, typer.Option(help="HOST:PORT of a node that mDNS does not reach.")] = None,
    no_mdns: Annotated[bool, typer.Option("--no-mdns", help="Do not look for nodes with mDNS.")] = False,
    no_local_node: Annotated[bool, typer.Option("--no-local-node", help="Leave this machine out.")] = False,
    wait_s: Annotated[float, typer.Option("--wait", min=0.1, help="Seconds to look for nodes.")] = 3.0,
    state: _State = None,
    as_json: _Json = False,
) -> None:
    """Show how MODEL would be placed on the nodes that are here, without loading anything.

    Without MODEL: the size of models that this pool can hold.
    """
    from cluster.cli.plan import PlanCommand, plan_command
    from cluster.cli.running import run_command

    run_command(
        plan_command,
        PlanCommand(
            model=model,
            cluster=cluster,
            min_nodes=min_nodes,
            context=context,
            users=users,
            peers=tuple(peer or ()),
            mdns=not no_mdns,
            local_node=not no_local_node,
            wait_s=wait_s,
            state=state,
            as_json=as_json,
        ),
    )


@app.command()
def status(url: _Url = _DEFAULT_URL, as_json: _Json = False) -> None:
    """Show the cluster behind an endpoint: nodes, plan, load, and where each token's time goes."""
    from cluster.cli.running import run_command
    from cluster.cli.status import status_command

    run_command(lambda: status_command(url, as_json=as_json))


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this once; without it, a conversation.")] = None,
    url: _Url = _DEFAULT_URL,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0 is the likeliest answer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
) -> None:
    """Talk to the model behind an endpoint."""
    from cluster.cli.chat import ChatCommand, chat_command
    from cluster.cli.running import run_command

    run_command(chat_command, ChatCommand(prompt, url, system, temperature, max_tokens))


@app.command()
def doctor(state: _State = None, as_json: _Json = False) -> None:
    """Find out why it does not work here, and what to do about it."""
    from cluster.cli.doctor import doctor as examine

    raise typer.Exit(examine(as_json, state))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A folder, a hub id or `demo`.")],
    stages: Annotated[int, typer.Option(min=1, help="How many stages to cut the model into.")] = 2,
    backend: Annotated[
        str, typer.Option(help="Engine of each stage, such as torch,mlx; one name is for all.")
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=2, help="Length of the test input.")] = 48,
    as_json: _Json = False,
) -> None:
    """Prove that every stage and layer computes what the single-process library computes.

    Runs in this process: the reference model is held whole, so it must fit this machine.
    """
    from cluster.cli.running import run_command
    from cluster.cli.verify import VerifyCommand, verify_command

    run_command(verify_command, VerifyCommand(model, stages, backend, tokens, as_json))


def main() -> None:
    """The console script."""
    app(prog_name="potluck")


if __name__ == "__main__":
    main()
