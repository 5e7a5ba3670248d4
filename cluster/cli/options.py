"""Arguments and options that several commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id such as Qwen/Qwen3-8B, or `demo`.")
]
Peers = Annotated[
    list[str] | None, typer.Option(metavar="HOST:PORT", help="Address of a node that mDNS does not reach.")
]
MinNodes = Annotated[
    int, typer.Option("--min-nodes", min=0, help="Wait for this many nodes and give each of at least so many a stage.")
]
NoMdns = Annotated[bool, typer.Option("--no-mdns", help="Do not look for nodes with mDNS.")]
NoLocalNode = Annotated[bool, typer.Option("--no-local-node", help="Leave this machine out.")]
State = Annotated[
    Path | None,
    typer.Option("--state", envvar="POTLUCK_HOME", help="Where keys, hashes and weights are kept. [~/.potluck]"),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, for scripts.")]
Url = Annotated[str, typer.Option("--url", help="The endpoint to talk to.")]
Cluster = Annotated[str, typer.Option("--cluster", help="Nodes and coordinators of one cluster find each other.")]
Users = Annotated[int, typer.Option("--users", min=1, max=256, help="Answers of full length at the same time.")]
Context = Annotated[
    str, typer.Option("--context", metavar="TOKENS", help="Longest prompt plus answer in tokens, or auto.")
]
QueueTimeout = Annotated[
    float,
    typer.Option(
        "--queue-timeout",
        metavar="SECONDS",
        min=0.1,
        help="Longest wait for room; clients shorten it with `queue_timeout`. For batch: a day.",
    ),
]
FirstTokenTimeout = Annotated[
    float,
    typer.Option(
        "--first-token-timeout",
        metavar="SECONDS",
        min=0.1,
        help="Longest time from getting room to the first token; clients shorten it with `first_token_timeout`. "
        "For batch: a day.",
    ),
]
TokenTimeout = Annotated[
    float,
    typer.Option(
        "--token-timeout",
        metavar="SECONDS",
        min=0.1,
        help="Longest time between two tokens; clients shorten it with `token_timeout`. For batch: a day.",
    ),
]
RequestTimeout = Annotated[
    float,
    typer.Option(
        "--request-timeout",
        metavar="SECONDS",
        min=0.1,
        help="Longest time for a whole request; clients shorten it with `timeout`. For batch: a day.",
    ),
]
Grace = Annotated[
    float,
    typer.Option(
        "--grace",
        metavar="SECONDS",
        min=0,
        help="When a machine is lost and the others cannot go on: how long answers wait for it to come back.",
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        "--bits",
        metavar="4|6|8",
        help="Quantise full-precision weights to so many bits when they are loaded, in groups of 64. [as stored]",
    ),
]
WireBits = Annotated[
    str | None,
    typer.Option(
        "--wire-bits",
        metavar="8|auto",
        help="Send prompts' activations between nodes in 8 bits, always or over links where it is measured to pay; "
        "those of answers always go as computed. `verify --wire-bits 8` shows what it changes. [as computed]",
    ),
]
ExitWith = Annotated[int | None, typer.Option(hidden=True, help="End when this parent process ends.")]
Reserve = Annotated[str | None, typer.Option(metavar="SHARE", help="Keep this share for whoever works here. [15%]")]
Coordinators = Annotated[
    list[str] | None, typer.Option(metavar="HOST:PORT", help="Address of a coordinator that mDNS does not reach.")
]
NodeWeightsMax = Annotated[
    str | None,
    typer.Option(
        "--weights-max",
        metavar="SIZE",
        help="Keep at most this much of models on disk, such as 200GiB; of several devices each one's node. "
        "[80% of the disk]",
    ),
]
ServeWeightsMax = Annotated[
    str | None,
    typer.Option(
        "--weights-max",
        metavar="SIZE",
        help="Keep at most this much of what this machine's node fetches, such as 200GiB, and as much again of what is "
        "made of GGUF files; `verify` and `models pull` do not know it. [80% of the disk]",
    ),
]
Memory = Annotated[str | None, typer.Option(metavar="SIZE", help="Use at most this much, such as 8GiB.")]
DEFAULT_URL = "http://127.0.0.1:8000"
