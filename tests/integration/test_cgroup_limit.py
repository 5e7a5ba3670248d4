"""A real control group's limit reaches a node's budget."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.quantities import MIB

pytestmark = pytest.mark.root

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_LIMIT_BYTES = 512 * MIB


@pytest.fixture
def group() -> Iterator[Path]:
    """A group limited to 512 MiB, removed by name afterwards."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("control groups need Linux and root")
    parent, file = (_V1, "memory.limit_in_bytes") if (_V1 / "memory.limit_in_bytes").exists() else (_V2, "memory.max")
    made = parent / f"potluck-{secrets.token_hex(4)}"
    try:
        made.mkdir()
        (made / file).write_text(str(_LIMIT_BYTES))
    except OSError as error:
        if made.exists():
            made.rmdir()
        pytest.skip(f"no memory group can be made in {parent}: {error}")
    try:
        yield made
    finally:
        made.rmdir()


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
