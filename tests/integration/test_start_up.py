"""The command starts quickly, and without the engines: what a base install has to do."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cli.serve import potluck_command

HELP_S = 0.5
"""What is promised; tests allow three times as much."""

ENGINES = ("torch", "transformers", "safetensors", "mlx", "mlx_lm")

_WITHOUT_ENGINES = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({ENGINES!r}))  # Python takes None for "not installed"
"""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_is_quick() -> None:
    took = []
    for _ in range(5):
        began = time.perf_counter()
        result = _run(potluck_command("--help"))
        took.append(time.perf_counter() - began)
        assert result.returncode == 0
        assert "serve" in result.stdout and "join" in result.stdout
    assert min(took) < 3 * HELP_S


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["join", "--help"], ["--version"]])
def test_help_imports_no_engine(arguments: list[str]) -> None:
    result = _run([sys.executable, "-X", "importtime", "-m", "cluster.cli.main", *arguments])
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {*ENGINES, "numpy", "grpc", "zeroconf"}


def test_everything_but_the_engines_can_be_imported_without_them() -> None:
    root = Path(__file__).parents[2]
    modules = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for package in ("cluster", "coordinator", "node")
        for path in sorted((root / package).rglob("*.py"))
    ]
    ours = [name for name in modules if not name.startswith(("node.engines.torch", "node.engines.mlx"))]
    assert len(ours) > 80
    script = f"{_WITHOUT_ENGINES}\nfor name in {ours!r}:\n    importlib.import_module(name)\n"
    result = _run([sys.executable, "-c", script])
    assert result.returncode == 0, result.stderr


def test_a_base_install_that_joins_is_told_what_to_install(tmp_path: Path) -> None:
    arguments = ["join", "--no-mdns", "--state", str(tmp_path)]
    script = f"{_WITHOUT_ENGINES}\nfrom cluster.cli.main import app\napp({arguments!r}, prog_name='potluck')\n"
    result = _run([sys.executable, "-c", script])
    assert result.returncode == 2
    assert "potluck[torch]" in result.stderr
    assert "Traceback" not in result.stderr
