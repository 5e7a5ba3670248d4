"""`potluck`: the commands and their options. Each imports what it runs only when it runs, so `--help` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster import __version__, limits
from cluster.cli import options as opt
from cluster.cli.bench_options import bench
from cluster.cli.models import app as models_app
from cluster.cli.verify_options import verify

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
app.command()(bench)


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
    model: opt.Model,
    host: Annotated[str, typer.Option(help="Address of the HTTP endpoint.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTTP endpoint; 0 picks one.")] = 8000,
    cluster: opt.Cluster = "default",
    no_local_node: opt.NoLocalNode = False,
    min_nodes: opt.MinNodes = 0,
    context: opt.Context = "auto",
    users: opt.Users = 4,
    bits: opt.Bits = None,
    queue_timeout: opt.QueueTimeout = limits.QUEUE_TIMEOUT_S,
    first_token_timeout: opt.FirstTokenTimeout = limits.FIRST_TOKEN_TIMEOUT_S,
    token_timeout: opt.TokenTimeout = limits.BETWEEN_TOKENS_TIMEOUT_S,
    request_timeout: opt.RequestTimeout = limits.REQUEST_TIMEOUT_S,
    grace: opt.Grace = limits.GRACE_S,
    no_prefix_cache: Annotated[
        bool, typer.Option("--no-prefix-cache", help="Compute every prompt anew, also where another began alike.")
    ] = False,
    wire_bits: opt.WireBits = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Do not use the node of this name.")] = None,
    peer: opt.Peers = None,
    no_mdns: opt.NoMdns = False,
    cluster_host: Annotated[str, typer.Option(help="Address that nodes reach. [every interface]")] = "",
    cluster_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port for `join --coordinator`; another is taken when it is in use.")
    ] = 7433,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    weights_max: opt.ServeWeightsMax = None,
    exit_with: opt.ExitWith = None,
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """Serve MODEL to every OpenAI client, computed by all nodes of the cluster.

    A node on this machine takes part unless --no-local-node. The endpoint answers from the start: /health at
    once, /ready with 200 as soon as a real token came out.

    \b
    Examples:
      potluck serve demo                            the built-in model, to see it work
      potluck serve Qwen/Qwen3-8B                   from the hub, on all nodes that are here
      potluck serve ~/models/big --min-nodes 3      wait for three machines
      potluck serve MODEL --context 32768 --users 2 longer chats, fewer at a time
      potluck serve MODEL --host 0.0.0.0            for clients on other machines
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
            bits=bits,
            queue_timeout_s=queue_timeout,
            first_token_timeout_s=first_token_timeout,
            token_timeout_s=token_timeout,
            request_timeout_s=request_timeout,
            grace_s=grace,
            prefix_cache=not no_prefix_cache,
            wire_bits=wire_bits,
            exclude=tuple(exclude or ()),
            peers=tuple(peer or ()),
            mdns=not no_mdns,
            cluster_host=cluster_host,
            cluster_port=cluster_port,
            weights_max=weights_max,
            state=state,
            exit_with=exit_with,
            as_json=as_json,
        ),
    )


@app.command()
def join(
    name: Annotated[str | None, typer.Option(help="What this node is called. [this machine's name]")] = None,
    cluster: opt.Cluster = "default",
    backend: Annotated[str, typer.Option(help="auto, torch or mlx.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda[:N][,...], mps or metal.")] = "auto",
    memory: opt.Memory = None,
    reserve: opt.Reserve = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine. [all cores]")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. [every interface]")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks one.")] = 0,
    coordinator: opt.Coordinators = None,
    no_mdns: Annotated[bool, typer.Option("--no-mdns", help="Do not advertise with mDNS.")] = False,
    weights_max: opt.NodeWeightsMax = None,
    exit_with: opt.ExitWith = None,
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """Offer this machine to a cluster, and wait to be used.

    The node advertises itself with mDNS; where that does not work, name the coordinator with --coordinator.
    Several devices (--device cuda:0,cuda:1) become one supervised node each.

    \b
    Examples:
      potluck join                                  all that this machine can spare
      potluck join --memory 8GiB --threads 4        no more than that
      potluck join --coordinator 192.168.1.5:7433   where mDNS does not reach
      potluck join --name second --state ~/.potluck-second     another node on this machine
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
        str | None,
        typer.Argument(metavar="MODEL", help="A folder, a GGUF file, a hub id or `demo`; without it: what fits here."),
    ] = None,
    cluster: opt.Cluster = "default",
    min_nodes: opt.MinNodes = 0,
    context: opt.Context = "auto",
    users: opt.Users = 4,
    bits: opt.Bits = None,
    peer: opt.Peers = None,
    no_mdns: opt.NoMdns = False,
    no_local_node: opt.NoLocalNode = False,
    wait_s: Annotated[float, typer.Option("--wait", min=0.1, help="Seconds to look for nodes.")] = 3.0,
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """Show how MODEL would be placed on the nodes that are here, without loading anything.

    Without MODEL: the size of models that this pool can hold.

    \b
    Examples:
      potluck plan                                  what fits here?
      potluck plan Qwen/Qwen3-32B                   reads only the headers from the hub
      potluck plan MODEL --context 65536 --users 1  and with a longer context?
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
            bits=bits,
            peers=tuple(peer or ()),
            mdns=not no_mdns,
            local_node=not no_local_node,
            wait_s=wait_s,
            state=state,
            as_json=as_json,
        ),
    )


@app.command()
def status(url: opt.Url = opt.DEFAULT_URL, as_json: opt.Json = False) -> None:
    """Show the cluster behind an endpoint: nodes, plan, load, and where each token's time goes."""
    from cluster.cli.running import run_command
    from cluster.cli.status import status_command

    run_command(lambda: status_command(url, as_json=as_json))


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this once; without it, a conversation.")] = None,
    url: opt.Url = opt.DEFAULT_URL,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0 is the likeliest answer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
) -> None:
    """Talk to the model behind an endpoint.

    \b
    Examples:
      potluck chat                                  a conversation
      potluck chat "Why is the sky blue?"           one answer
      potluck chat --url http://192.168.1.5:8000    with a cluster elsewhere
    """
    from cluster.cli.chat import ChatCommand, chat_command
    from cluster.cli.running import run_command

    run_command(chat_command, ChatCommand(prompt, url, system, temperature, max_tokens))


@app.command()
def doctor(state: opt.State = None, as_json: opt.Json = False) -> None:
    """Find out why it does not work here, and what to do about it."""
    from cluster.cli.doctor import doctor as examine

    raise typer.Exit(examine(as_json, state))


app.command()(verify)


def main() -> None:
    """The console script."""
    app(prog_name="potluck")


if __name__ == "__main__":
    main()
