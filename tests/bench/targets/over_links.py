"""Target 8: targets 1 and 3 over networks, within what a network's delay and bandwidth leave possible."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from cluster.errors import ClusterError
from tests.bench import ceilings
from tests.bench.bench import TWO, Bench
from tests.bench.link import CABLE, WIFI, Link, linked, missing
from tests.bench.rows import Row, at_most, unmeasured
from tests.bench.stage_alone import passes_in_turn, passes_together
from tests.bench.targets.first_token import CHUNKS, PROMPT, shots
from tests.bench.trip import floor_s

_TIMEOUT_S = 900.0
_WITHIN = 1.1


def rows(bench: Bench) -> list[Row]:
    absent = missing()
    if absent is not None:
        return [unmeasured(8, f"over {link.name}", absent) for link in (CABLE, WIFI)]
    return [row for link in (CABLE, WIFI) for row in _link_rows(bench, link)]


def _link_rows(bench: Bench, link: Link) -> list[Row]:
    width = int(bench.arm(TWO).status()["plan"]["boundary_bytes"])
    passes = bench.passes(TWO, bench.shot(1), passes_in_turn)
    found = _measured(bench, link, passes, [width, *(width * chunk for chunk in CHUNKS)])
    if [tuple(stage) for stage in found["stages"]] != list(bench.arm(TWO).stages):
        raise ClusterError(f"the plan over {link.name} cuts the model elsewhere: {found['stages']}")
    crossing = {int(size): float(seconds) for size, seconds in found["hops_s"].items()}
    trip_s = float(found["trip_s"])
    here_s = bench.hop_s()  # into the first stage, which is beside the coordinator
    best_token_s = ceilings.token_s(passes, here_s + trip_s)
    together = bench.measure_alone(TWO, shots(bench), passes_together)
    best_first_s = min(
        ceilings.prompt_s(passes, PROMPT, chunk, here_s + crossing[width * chunk] + crossing[width])
        for passes, chunk in zip(together, CHUNKS, strict=True)
    )
    token_s, first_s, narrow_s = (float(found[name]) for name in ("token_s", "first_s", "narrow_first_s"))
    return [
        Row(8, f"{link.name}: one user's time per token, to the ceiling", token_s / best_token_s, "", 1.0,
            at_most(_WITHIN)),
        Row(8, f"{link.name}: first token of {PROMPT}, to the ceiling", first_s / best_first_s, "", 1.0,
            at_most(_WITHIN)),
        Row(8, f"{link.name}: one user's time per token", 1000 * token_s, "ms", 1000 * best_token_s,
            note="mean, late frames included"),
        Row(8, f"{link.name}: first token of {PROMPT}", first_s, "s", best_first_s),
        Row(8, f"{link.name}: first token of {PROMPT}, prompts in 8 bits on the link", narrow_s, "s"),
        Row(8, f"{link.name}: first token of {PROMPT}, in 8 bits to as computed", narrow_s / first_s, ""),
        Row(8, f"{link.name}: error of activations in 8 bits", 100 * float(found["narrow_error"]), "%",
            note="rms of the difference to rms of the numbers, of the prompt's last piece"),
        Row(8, f"{link.name}: a token's way there and back by itself", 1000 * trip_s, "ms",
            1000 * floor_s(link, width, (passes[0], passes[1])), note="the ceiling is what the emulated frames take"),
    ]  # fmt: skip


def _measured(bench: Bench, link: Link, passes: ceilings.Passes, widths: list[int]) -> Mapping[str, Any]:
    """What a process on one side of the link saw; the models' sides of it are namespaces of their own."""
    effort = bench.effort
    with linked(link) as ends:
        command = [*ends.at_here, sys.executable, "-m", "tests.bench.over_link", bench.form.name, ends.here, ends.there]
        command += [
            ends.at_there[-1],
            bench.backend,
            str(effort.rounds),
            str(effort.output_tokens),
            *map(str, (*passes, *widths)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise ClusterError(f"over {link.name}: {done.stderr[-600:]}")
    found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
