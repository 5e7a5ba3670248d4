"""A real control group's limit reaches a node's budget."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.quantities import MIB
from tests.integration.control_groups import limited_group

pytestmark = pytest.mark.root

_LIMIT_BYTES = 512 * MIB


@pytest.fixture
def group() -> Iterator[Path]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("control groups need Linux and root")
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(limited_group(_LIMIT_BYTES))
        except OSError as error:
            pytest.skip(f"no memory group can be made: {error}")
        yield made


def test_two_groups_of_one_machine_have_memory_of_their_own(group: Path) -> None:
    with limited_group(2 * _LIMIT_BYTES) as other:
        (one, machine), (two, machine_again) = map(_measured_in, (group, other))
    assert 0 < one["budget_bytes"] < _LIMIT_BYTES < two["budget_bytes"] < 2 * _LIMIT_BYTES
    assert one["id"] != two["id"]
    assert min(machine, machine_again) > two["budget_bytes"]


def _measured_in(group: Path) -> tuple[dict[str, Any], int]:
    """The innermost group as a process in it measures it, and the machine."""
    code = (
        f"import json, os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "from dataclasses import asdict\n"
        "from cluster.types import Backend\n"
        "from node.hardware import Device, measure_memory\n"
        "report = measure_memory(Device(Backend.TORCH, 'cpu', ''))\n"
        "print(json.dumps([asdict(report.groups[-1]), report.host_budget_bytes]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    innermost, machine_bytes = json.loads(result.stdout)
    return innermost, machine_bytes


def test_a_process_in_a_limited_group_measures_the_limit_as_its_memory(group: Path) -> None:
    code = (
        f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "from cluster.types import Backend\n"
        "from node.hardware import Device, measure_memory\n"
        "report = measure_memory(Device(Backend.TORCH, 'cpu', ''))\n"
        "print(report.total_bytes, report.budget_bytes < report.total_bytes, report.explained)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    total, below, explained = result.stdout.strip().split(" ", 2)
    assert int(total) == _LIMIT_BYTES
    assert below == "True"
    assert "limited to 512.0 MiB by its control group" in explained
