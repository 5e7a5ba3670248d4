"""A pytest plugin that writes what the oracle tests showed to a file:

    python -m pytest tests/oracle -p tests.oracle.recording --shown docs/models.json

Owns: the file. What a test showed is in its ledger; it counts when the test passed. `make docs` begins with an empty
file; while a family is being added, the tests run alone add to the file that is there.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.oracle import ledger
from tests.oracle.ledger import Shown

_all: set[Shown] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shown", type=Path, required=True, help="add what the passing tests show to this file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    shown = ledger.take()
    if report.when == "call" and report.passed:
        _all.update(shown)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path = session.config.getoption("--shown")
    path.write_text(write(_all | (read(path.read_text()) if path.exists() else set())))


def write(shown: set[Shown]) -> str:
    """One line for each, sorted, so that changes read well."""
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in sorted(shown))
    return f"[\n{lines}\n]\n"


def read(text: str) -> set[Shown]:
    return {Shown(**(entry | {"engines": tuple(entry["engines"])})) for entry in json.loads(text)}
