"""`potluck status`: the cluster behind an endpoint, for people or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from rich.console import Console

from cluster.cli.display import layer_bar
from cluster.cli.endpoint import Endpoint
from cluster.quantities import format_bytes


def status_command(url: str, *, as_json: bool) -> int:
    status = Endpoint(url).get("/potluck/status")
    if as_json:
        sys.stdout.write(json.dumps(status) + "\n")
        return 0
    console = Console(highlight=False, soft_wrap=True)
    for line in status_lines(status):
        console.print(line, markup=False)
    return 0


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """The picture as text."""
    lines = [f"cluster {status['cluster']}: {status['phase']}" + (f" ({status['reason']})" if status["reason"] else "")]
    if model := status["model"]:
        size = f"{format_bytes(model['bytes'])} in {model['format']}"
        lines.append(f"model {model['name']}: {model['architecture']}, {size}")
    for node in status["nodes"]:
        memory = node["memory"]
        stage = "no stage" if node["stage"] is None else f"stage {node['stage']}"
        lines.append(
            f"  {node['name']} ({node['backend']} on {node['device']}) {stage}, {node['phase']}, "
            f"may give the model {format_bytes(memory['budget_bytes'])}, process uses "
            f"{format_bytes(memory['used_bytes'])} in all, "
            f"pressure {memory['pressure']}{_weights(node['weights'])}"
            + (f"; {node['problem']}" if node["problem"] else "")
        )
    lines += [f"  {item['who']} is not used: {item['reason']}" for item in status["turned_away"]]
    lines += plan_table(status)
    if (load := status["load"]) is not None:
        lines.append(
            f"{load['running']} answers running, {load['waiting']} waiting, "
            f"{load['kv_tokens_reserved']} of {load['kv_tokens']} cache tokens reserved"
        )
        lines.append(_prefixes(load["prefix_cache"]))
        lines += _links(status)
        lines += time_lines(status)
    return lines


def _prefixes(cache: Mapping[str, Any]) -> str:
    """What is kept of ended answers, and what it has saved."""
    if not cache["enabled"]:
        return "prefix cache: off"
    share = cache["cached_tokens"] / cache["prompt_tokens"] if cache["prompt_tokens"] else 0.0
    return (
        f"prefix cache: {cache['retained_tokens']} tokens of {cache['retained_sequences']} answers kept; "
        f"{cache['cached_tokens']} of {cache['prompt_tokens']} prompt tokens were not computed again ({share:.0%})"
    )


def _links(status: Mapping[str, Any]) -> list[str]:
    """What is known of the network between the stages: its rate, and what prompts lose on it in eight bits."""
    lines = []
    for link, (sender, receiver) in zip(status["load"]["links"], pairwise(status["plan"]["stages"]), strict=False):
        rate = [f"{format_bytes(int(link['bytes_s']))}/s"] if link["bytes_s"] else []
        error = "" if link["narrow_error"] is None else f", {link['narrow_error']:.1%} off the last time"
        narrow = [f"{link['narrow_tokens']} tokens of prompts in 8 bits{error}"] if link["narrow_tokens"] else []
        if rate or narrow:
            lines.append(f"from {sender['node']} to {receiver['node']}: {', '.join(rate + narrow)}")
    return lines


def _weights(weights: Mapping[str, Any]) -> str:
    """What the node's disk holds for others, and whether it is sending it."""
    held = f", {format_bytes(weights['held_bytes'])} of the weights on its disk" if weights["held_bytes"] else ""
    rate_bytes_s = int(weights["sending_bytes_s"])
    return held + (f", sending {format_bytes(rate_bytes_s)}/s to other nodes" if rate_bytes_s else "")


def plan_table(status: Mapping[str, Any]) -> list[str]:
    """The plan as a bar for each machine; empty before there is one."""
    plan = status["plan"]
    if not plan:
        return []
    count = plan["stages"][-1]["last_layer"]
    width = max(len(stage["node"]) for stage in plan["stages"])
    lines = [f"plan: context {plan['context_tokens']} tokens for {plan['users']} at once"]
    for stage in plan["stages"]:
        first, last = stage["first_layer"], stage["last_layer"]
        taken = stage["weight_bytes"] + stage["kv_bytes"] + stage["workspace_bytes"]
        lines.append(
            f"  {stage['node']:<{width}} {stage['backend']:<5} |{layer_bar(first, last, count)}| "
            f"layers {first}-{last - 1}, {format_bytes(taken)}"
        )
    return lines + [f"  {item['node']} is left out: {item['reason']}" for item in plan["left_out"]]


def time_lines(status: Mapping[str, Any]) -> list[str]:
    """Where each token's time went; empty before the first one."""
    times = status["load"]["token_time"] if status["load"] else None
    if not times:
        return []
    stages = status["plan"]["stages"]
    width = max(len(stage["node"]) for stage in stages)
    total = times["total_s"]
    lines = [f"each token took {total * 1000:.2f} ms (mean of the last {times['steps']}):"]
    for stage, spent in zip(stages, times["stages"], strict=True):
        lines.append(_share(f"{stage['node']:<{width}} computing", spent["compute_s"], total))
    waiting = sum(spent["queue_s"] + spent["receive_s"] for spent in times["stages"])
    lines.append(_share(f"{'waiting for an engine':<{width + 10}}", waiting, total))
    lines.append(_share(f"{'on the network':<{width + 10}}", times["hops_s"], total))
    return lines


def _share(label: str, seconds: float, total: float) -> str:
    share = seconds / total if total else 0.0
    return f"  {label} {seconds * 1000:7.2f} ms {share:4.0%} {'▇' * round(share * 30)}"
