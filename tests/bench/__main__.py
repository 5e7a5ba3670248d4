"""Usage: python -m tests.bench [--only 1,3] [--forms dense,experts,dense4,experts4] [--quick] [--peers] [--write FILE]

Prints rows as they are measured and writes the page, where they take the place of what earlier runs found of the same
forms and targets. A target that cannot be measured becomes a row that says why.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from cluster.errors import PotluckError, UsageError
from tests.bench import cores
from tests.bench.bench import Bench, bench_of
from tests.bench.loads import FULL, QUICK, Effort
from tests.bench.machine import Beside, commit, machine, now
from tests.bench.model import FORMS, Form
from tests.bench.peers.build import build
from tests.bench.peers.llama import llama_arms
from tests.bench.record import Run
from tests.bench.rows import Row, unmeasured
from tests.bench.table import Table
from tests.bench.targets import (
    beside_prefill,
    first_token,
    gpu,
    hops,
    many_users,
    one_core,
    one_user,
    over_links,
    second_turn,
    weights,
)

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"

_DEFAULT_FORMS = "dense,experts,dense4,experts4,hybrid"
_COORDINATOR, _WEIGHTS = "The coordinator by itself", "Weights over links"
_ORDER = (*(form.title for form in FORMS.values()), _COORDINATOR, _WEIGHTS)

Measure = Callable[[Bench], list[Row]]

TARGETS: dict[int, Measure] = {
    1: one_user.rows,
    2: many_users.rows,
    3: first_token.rows,
    4: beside_prefill.rows,
    5: second_turn.rows,
    6: many_users.first_tokens,
    7: hops.rows,
    8: over_links.rows,
    9: gpu.rows,
    10: one_core.rows,
}
WITHOUT_FORM = {7, weights.TARGET}
"""What no form of the model has a part in, all or some of it; measured beside a whole form."""
EVERY_FORM = {1, 2, 3, 5}
"""What is measured on every form; the rest on these two, where nothing else is asked for."""
WHOLE = {FORMS["dense"], FORMS["trial"]}
ONLY = {FORMS["hybrid"]: {5}}
"""Forms for the sake of one target."""
COMPARED = {1, 2, 3, 6, 10}
"""What llama.cpp is measured on as well; the others do without its arms, and without its form of their model."""


def main() -> int:
    options = _options()
    cores.check()
    os.sched_setaffinity(0, cores.client_cores())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started ends with it
    if options.peers:
        build()
    effort = QUICK if options.quick else FULL
    used = ", ".join(map(str, cores.client_cores()))
    described = machine(peers=options.peers, engine=options.backend, client_cores=used)
    run = Run(now(), commit(), described, options.quick, "", 0.0)
    table = Table(options.write, run, beside := Beside(), _ORDER)
    with beside:
        for form in options.forms:
            if wanted := sorted(_wanted(form, options)):
                _measure(table, form, wanted, effort, options)
        apart = set[int](options.only or (WITHOUT_FORM if WHOLE & set(options.forms) else ()))
        if 7 in apart:
            table.begin(_COORDINATOR)
            table.add(7, lambda: hops.coordinator_rows(effort.coordinator_seconds))
        if weights.TARGET in apart:
            table.begin(_WEIGHTS)
            table.add(weights.TARGET, lambda: weights.rows(effort))
    sys.stdout.write(f"The page is {options.write}\n")
    return 0


def _wanted(form: Form, options: argparse.Namespace) -> set[int]:
    """Of a form that was named, exactly the targets that were named too."""
    usual = set(TARGETS) if form in WHOLE else ONLY.get(form, EVERY_FORM)
    if not options.only:
        return usual
    named = set[int](options.only & TARGETS.keys())
    return named if options.chosen else named & usual


def _measure(table: Table, form: Form, wanted: Sequence[int], effort: Effort, options: argparse.Namespace) -> None:
    """One form: its arms come up once, and every wanted target is measured on them."""
    table.begin(form.title)
    with ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potluck-bench-")))
        try:
            others = stack.enter_context(llama_arms(form)) if options.peers and COMPARED & set(wanted) else {}
            bench = stack.enter_context(bench_of(form, effort, state, backend=options.backend, others=others))
        except (PotluckError, AssertionError, OSError) as error:
            why = str(error)
            for number in wanted:
                table.add(number, lambda number=number: [unmeasured(number, "the arms did not come up", why)])  # type: ignore[misc]
            return
        for number in wanted:
            table.add(number, lambda number=number: TARGETS[number](bench))  # type: ignore[misc]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure the project's targets.")
    parser.add_argument("--only", metavar="N,...", default="", help="these targets (all)")
    parser.add_argument("--forms", metavar="NAME,...", help=f"of {', '.join(FORMS)} ({_DEFAULT_FORMS})")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter loads: does it work?")
    parser.add_argument("--peers", action="store_true", help="llama.cpp in the same run; built when it is not there")
    parser.add_argument("--backend", default="torch", choices=("torch", "mlx"), help="the nodes' engine (torch)")
    parser.add_argument(
        "--write",
        type=Path,
        default=PAGE,
        metavar="FILE",
        help="the page; its record is beside it (docs/benchmarks.md)",
    )
    options = parser.parse_args()
    options.chosen = options.forms is not None
    names = (options.forms or _DEFAULT_FORMS).split(",")
    unknown = [name for name in names if name not in FORMS]
    if unknown:
        raise UsageError(f"expected --forms of {', '.join(FORMS)}, found {unknown[0]!r}")
    options.forms = [FORMS[name] for name in names]
    known = TARGETS.keys() | WITHOUT_FORM
    numbers = options.only.split(",") if options.only else []
    if not all(number.isdecimal() and int(number) in known for number in numbers):
        raise UsageError(f"expected --only with numbers from 1 to {max(known)}, such as 1,3, found {options.only!r}")
    options.only = {int(number) for number in numbers}
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PotluckError as error:
        sys.exit(f"bench: {error}")
