"""Two nodes with an emulated link between them, asked from the first one's side of it.

Runs as a process inside that side's namespace and prints what it measured in one JSON line.
Usage: python -m tests.bench.over_link FORM HOST HOST_BEYOND NAMESPACE_BEYOND BACKEND ROUNDS OUTPUT PASS_S PASS_S
BYTES...
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from cluster.cli.bench_measures import Load
from tests.bench.arms import Place, cluster_arm
from tests.bench.cores import client_cores
from tests.bench.hop_alone import hop_alone
from tests.bench.loads import IN_TOKENS, first_s, interleaved, run_load
from tests.bench.model import FORMS, Form
from tests.bench.targets.first_token import PROMPT
from tests.bench.trip import trip_alone
from tests.integration.live import eventually

_ROUND_TRIPS, _TOKEN_TRIPS = 100, 200


def measure(
    form: Form,
    places: tuple[Place, Place],
    backend: str,
    rounds: int,
    output: int,
    passes: tuple[float, float],
    widths: list[int],
) -> dict[str, object]:
    """Seconds of a user's token (the mean: late frames count), of a long prompt's first token, as computed and in eight
    bits with the error that its activations then have, of hops over the link by the bytes that they carry (the first of
    `widths` is one token's), and of a token's way there and back between passes of the stages."""
    with (
        tempfile.TemporaryDirectory(prefix="potluck-bench-") as state,
        cluster_arm("two nodes, linked", form, places, Path(state), backend=backend) as arm,
    ):
        results = run_load([arm], Load(1, IN_TOKENS, output, rounds=1), rounds)[arm.name]
        beyond = places[1]
        hops = {
            width: hop_alone(width, host=beyond.host, there=beyond.words, round_trips=_ROUND_TRIPS) for width in widths
        }
        trip_s = trip_alone(widths[0], passes, host=beyond.host, there=beyond.words, trips=_TOKEN_TRIPS)
        # Only now, as another cluster's heartbeats are late frames in a user's way too.
        with cluster_arm("in 8 bits", form, places, Path(state), backend=backend, serve=("--wire-bits", "8")) as narrow:
            answers = interleaved(
                [arm, narrow], rounds, lambda asked: asked.endpoint.ask(asked.endpoint.prompt(PROMPT), 1)
            )
            error = eventually(lambda: narrow.status()["load"]["links"][0]["narrow_error"], "a node tells the error")
        stages = arm.stages
    token_s = fmean(1 / result.user_tokens_s for result in results if result.user_tokens_s)
    return {
        "token_s": token_s,
        "first_s": first_s(answers[arm.name]),
        "narrow_first_s": first_s(answers[narrow.name]),
        "narrow_error": error,
        "hops_s": hops,
        "trip_s": trip_s,
        "stages": stages,
    }


def main(name: str, host: str, beyond: str, space: str, backend: str, *numbers: str) -> None:
    rounds, output, here_s, there_s, *widths = numbers
    os.sched_setaffinity(0, client_cores())
    places = (Place(host), Place(beyond, ("ip", "netns", "exec", space)))
    passes = (float(here_s), float(there_s))
    found = measure(FORMS[name], places, backend, int(rounds), int(output), passes, [int(width) for width in widths])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
