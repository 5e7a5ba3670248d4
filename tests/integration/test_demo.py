"""The first thing that a newcomer runs: `potluck demo`, with multicast and where it is blocked."""

from __future__ import annotations

import re
import subprocess
import sys

from cluster.cli.demo import ANSWER, QUESTION
from cluster.cli.serve import potluck_command
from tests.integration.netns import require_lan

_DEMO_S = 240  # asked for: five minutes on two cores with the install, which is done here

_SQUATTER = """
import socket, subprocess, sys
holds = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
holds.bind(("0.0.0.0", 5353))  # without SO_REUSEADDR: nobody else may have mDNS's port
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""


def demo(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, *potluck_command("demo", *arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=_DEMO_S, check=False)


def test_the_demo_answers_rightly_and_shows_what_it_did() -> None:
    result = demo()
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout
    assert "none could hold it alone" in said
    assert "over mDNS" in said or "static addresses" in said
    assert f"> {QUESTION}\n{ANSWER}" in said
    bars = re.findall(r"^  (\w+) +(torch|mlx) +\|([·█]+)\| layers (\d+)-(\d+)", said, re.MULTILINE)
    assert {name for name, *_ in bars} == {"kitchen", "study", "attic"}
    assert {backend for _, backend, *_ in bars} == {"torch", "mlx"}
    assert [int(first) for *_, first, _ in bars][1:] == [int(last) + 1 for *_, last in bars][:-1]
    assert len(re.findall(r"computing +\d+\.\d+ ms", said)) == 3
    assert "on the network" in said


def test_an_answer_from_the_wrong_question_is_no_success() -> None:
    """The check can fail: a question whose answer is empty after no tokens is impossible, so ask for nonsense
    against the usual answer through the judge itself."""
    from rich.console import Console

    from cluster.cli.demo import judge

    quiet = Console(quiet=True)
    assert judge(quiet, QUESTION, ANSWER)
    assert not judge(quiet, QUESTION, ANSWER[:-1])
    assert not judge(quiet, "Anything else?", " ")


def test_where_multicast_is_blocked_the_demo_says_so_and_works() -> None:
    require_lan()
    result = demo(prefix=("unshare", "--net", sys.executable, "-c", _SQUATTER))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "static addresses, since multicast is blocked here" in result.stdout
