"""docs/benchmarks.md from what was measured. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.bench.record import Part, Record, newest
from tests.bench.rows import Row

_HEAD = """# Benchmarks

Written by `make bench` (`make bench-peers` adds llama.cpp to the same run) from `benchmarks.json`; do not edit. A run
replaces what it measures, form by form and target by target, and leaves the rest with the runs that they are of. Every
number of a target's last run stands here, good or bad. Ratios count: absolute figures do not travel to another machine.
"""

_EVERY_TARGET = frozenset(range(1, 12))

_METHOD = """## Method

- **The model** is a 0.36-billion-parameter Llama shape (hidden 1024, 24 layers, 16 heads, 8 KV heads, intermediate
  3072, vocabulary 32000) with random bf16 weights, and a mixture of experts of the same size (Qwen3-MoE, 8 experts of
  384, 2 in use). "4 bits" is `serve --bits 4`. The hybrid is a smaller Qwen3-Next shape.
- **Every node is pinned to one core** with `taskset` and computes with one thread. Coordinators and the client may use
  the same cores in every arm.
- **Arms are interleaved in one run**: each load goes to one arm after the other, and again for each round. Rates and
  times are the client's, medians over the rounds; the client is `potluck bench`'s. Unless said otherwise a load is 100
  tokens in and 128 out, greedy, prompts of random words that no cache has seen.
- **The ceiling** is what stage passes and hops, measured alone, allow: the plan's own slices, each loaded by itself on
  one core, decoding at the load's mean context; for loads that keep all stages busy, with every stage computing at the
  same time; for one user on two nodes, with each stage resting while the other computes, because a core that has slept
  computes slower for a while. The ceiling of a row knows no scheduler, no HTTP and no tokenizer.
- **A hop** is one message from process to process: a token takes one into every stage and one back to the coordinator.
  Alone, it is half of a round trip of as many bytes over the same kind of stream, between two processes that do nothing
  but read through 64 MiB before they send: whatever a hop needs is no longer in a cache then, as between stages.
- **Links** are emulated by one process that carries frames of at most 9,000 bytes between two TAP devices, in order: so
  many bytes a second, so much later, and on the Wi-Fi some later still, which holds up those behind them. The ceiling
  counts a token's way over the same emulation, measured alone with pauses for the stages' passes, so what the emulator
  itself costs is in both. Four frames of a token may be late: what it sends
  each way, and TCP's acknowledgements. Ends use CUBIC or Reno, as most machines do, whatever this one is set to.
  "In 8 bits" is `serve --wire-bits 8`, in turns with a cluster without it; its error is what `potluck status` tells.
- **Weights** come to a namespace with an empty folder over cables shaped to 1 Gbit/s, in turns with plain sockets over
  the same cables. Sources, receiver, cables and hashes share this machine's cores, and all files lie in memory.
- **llama.cpp** is built from the sources inside `llama-cpp-python`, whose own server answers one request at a time;
  llama.cpp's server batches. Its RPC arm has a worker with one thread on each node's core and half of the layers in
  each; "4 bits" is its Q4_0 of the same weights. Its server shares the coordinators' cores.
- **The verdict** compares the value with the target; where it misses, it says by how much the value would have to
  change. A row without a target explains others.
"""


def render(record: Record) -> str:
    """The whole page."""
    machines = _machines(record)
    parts = [_HEAD]
    parts.append("## Runs\n")
    parts.append("| section | targets | measured | commit | machine | |\n|---|---|---|---|--:|---|")
    parts += [_run_line(section.title, part, machines) for section in record for part in section.parts]
    for number, machine in enumerate(machines, 1):
        parts.append(f"\n## Machine {number}\n\n| | |\n|---|---|")
        parts += [_cells(name, value) for name, value in machine.items()]
    parts.append("\n## Verdicts\n")
    parts.append(_summary(record))
    for section in record:
        parts.append(f"## {section.title}\n")
        parts.append("| # | what | measured | ceiling | target | verdict |\n|--:|---|--:|--:|--:|---|")
        parts += [_line(row) for row in section.rows]
        parts.append("")
        parts += [_run_text(part, record) for part in section.parts]
    parts.append(_METHOD)
    return "\n".join(parts)


def _machines(record: Record) -> list[Mapping[str, str]]:
    """Each once, in the order in which sections name them."""
    found: list[Mapping[str, str]] = []
    for run in (part.run for section in record for part in section.parts):
        if run.machine not in found:
            found.append(run.machine)
    return found


def _run_line(title: str, part: Part, machines: Sequence[Mapping[str, str]]) -> str:
    run = part.run
    number = machines.index(run.machine) + 1
    return _cells(title, _numbers(part.targets), run.date, run.commit, str(number), "quick" if run.quick else "")


def _run_text(part: Part, record: Record) -> str:
    """Under a section: how its rows of one run came about."""
    run, last = part.run, newest(record)
    text = f"Targets {_numbers(part.targets)}: measured on {run.date} at commit {run.commit}, in {run.seconds:.0f} s."
    if last is not None and run.commit != last.commit:
        text += f" **Another commit** than the newest here, {last.commit}."
    if run.quick:
        text += " **A quick run**: fewer rounds and shorter loads than the table is meant for."
    return f"{text} Meanwhile {run.beside}.\n"


def _numbers(targets: Sequence[int]) -> str:
    return ", ".join(map(str, targets))


def _summary(record: Record) -> str:
    rows = [row for section in record for row in section.rows]
    measured = [row for row in rows if row.promise is not None and row.value is not None]
    held = sum(row.verdict == "holds" for row in measured)
    missing = sum(row.value is None for row in rows)
    text = f"{held} of {len(measured)} measured targets hold; rows that could not be measured here: {missing}.\n"
    absent = sorted(_EVERY_TARGET - {row.target for row in rows})
    return text + (f"Not measured yet: targets {_numbers(absent)}.\n" if absent else "")


def _line(row: Row) -> str:
    target = "" if row.promise is None else f"{row.promise.kind} {quantity(row.promise.limit, row.unit)}"
    value = "" if row.value is None else quantity(row.value, row.unit)
    ceiling = "" if row.ceiling is None else quantity(row.ceiling, row.unit)
    verdict = " ".join(part for part in (row.verdict, f"({row.note})" if row.note else "") if part)
    return _cells(str(row.target), row.name, value, ceiling, target, verdict)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def quantity(value: float, unit: str) -> str:
    """With as many digits as the size of the number deserves."""
    if unit == "":
        return f"{value:.2f}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}"
