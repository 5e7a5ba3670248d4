"""Doctor's checks of what is installed: Python, packages, engines, GPU driver, and foreign packages of our names.

Each check is a function of facts that `doctor.py` gathers, so that every verdict can be tested without the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.cli.check import Check, Status
from cluster.types import Backend
from node.hardware import Machine
from node.memory_cuda import Driver

PYTHON_MINIMUM: Final = (3, 11)
OUR_PACKAGES: Final = ("cluster", "node", "coordinator")
_REQUIREMENT: Final = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)[^>;]*(?:>=\s*(?P<minimum>[0-9.]+))?[^;]*(?:;(?P<marker>.*))?"
)


@dataclass(frozen=True, slots=True)
class TorchProbe:
    """What torch said in a process of its own."""

    version: str
    built_for: str  # the CUDA or ROCm version it was built for; empty for the CPU build
    sees_gpu: bool
    problem: str  # why it could not be asked; empty when it could


def check_python(version: Sequence[int]) -> Check:
    """Python itself."""
    found = ".".join(map(str, version[:3]))
    if tuple(version[:2]) >= PYTHON_MINIMUM:
        return Check("python", Status.OK, found)
    needed = ".".join(map(str, PYTHON_MINIMUM))
    return Check("python", Status.FAIL, found, f"install Python {needed} or newer, and Potluck again with it")


def check_packages(requirements: Iterable[str] | None, installed: Mapping[str, str], system: str) -> Check:
    """The packages that Potluck needs, against what its own metadata asks for."""
    if requirements is None:
        return Check(
            "packages", Status.WARN, "Potluck runs from its source folder and is not installed", "run `make setup`"
        )
    wrong = []
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement.strip())
        if match is None or not _applies(match["marker"] or "", system):
            continue
        name, minimum, found = match["name"], match["minimum"], installed.get(canonical(match["name"]))
        if found is None:
            wrong.append(f"{name} is missing")
        elif minimum and _numbers(found) < _numbers(minimum):
            wrong.append(f"{name} is {found}, older than {minimum}")
    if wrong:
        again = "install Potluck again: `pipx reinstall potluck`, or `make setup` in a checkout"
        return Check("packages", Status.FAIL, "; ".join(wrong), again)
    return Check("packages", Status.OK, "all that Potluck needs, new enough")


def check_engines(machine: Machine, versions: Mapping[Backend, str]) -> Check:
    """At least one engine, so that this machine can be a node."""
    if machine.engines:
        return Check("engines", Status.OK, "; ".join(versions[backend] for backend in sorted(machine.engines)))
    extra = "mlx" if machine.apple_silicon else "torch"
    return Check(
        "engines",
        Status.WARN,
        "none; this machine can coordinate but not compute",
        f"run `pipx install --force 'potluck[{extra}]'` to make it a node",
    )


def check_mlx_pair(mlx: str | None, mlx_backends: Mapping[str, str], system: str) -> Check | None:
    """MLX on Linux is two packages that must be of one version; a mismatch crashes on import."""
    if mlx is None or system != "Linux":
        return None
    if not mlx_backends:
        return Check("mlx", Status.FAIL, f"mlx {mlx} without its Linux half", f"run `pip install 'mlx[cpu]=={mlx}'`")
    wrong = {name: version for name, version in mlx_backends.items() if version != mlx}
    if wrong:
        found = ", ".join(f"{name} {version}" for name, version in wrong.items())
        repair = " ".join(f"{name}=={mlx}" for name in wrong)
        return Check("mlx", Status.FAIL, f"mlx {mlx} with {found}", f"run `pip install {repair}`")
    return Check("mlx", Status.OK, f"mlx {mlx} and its Linux half agree")


def check_gpu(driver: Driver, machine: Machine, torch: TorchProbe | None) -> Check:
    """Whether torch can use the NVIDIA GPUs that the driver sees. Without a driver there is nothing to match."""
    if driver.problem:
        return Check(
            "gpu",
            Status.FAIL,
            f"the NVIDIA driver does not answer: {driver.problem}",
            "restart the machine (after an update driver and library differ until then), else reinstall the driver",
        )
    if not machine.gpus:
        return Check("gpu", Status.OK, machine.chip if machine.apple_silicon else "no NVIDIA GPU")
    seen = f"{', '.join(machine.gpus)} with driver {driver.version}"
    if torch is None:
        return Check(
            "gpu", Status.WARN, f"{seen}, but no torch to use it", "run `pipx install --force 'potluck[torch]'`"
        )
    if torch.problem:
        return Check("gpu", Status.FAIL, f"{seen}, but torch does not start: {torch.problem}", "run `make setup` again")
    if not torch.built_for:
        return Check(
            "gpu",
            Status.FAIL,
            f"{seen}, but torch {torch.version} is its CPU build",
            "install torch's default build: `make setup` in a checkout, else `pipx reinstall potluck`",
        )
    if not torch.sees_gpu:
        return Check(
            "gpu",
            Status.FAIL,
            f"{seen}, but torch {torch.version}, built for CUDA {torch.built_for}, cannot use it",
            f"update the NVIDIA driver to one that knows CUDA {torch.built_for}, or unset CUDA_VISIBLE_DEVICES",
        )
    return Check("gpu", Status.OK, f"{seen}; torch {torch.version} can use it")


def check_foreign(locations: Mapping[str, Path | None], home: Path, providers: Mapping[str, Sequence[str]]) -> Check:
    """Packages called `cluster` and `node` exist in the public index too; one beside ours breaks either.

    `locations` says where Python would import each of our names from, `home` where this very code lies,
    `providers` which installed distributions claim each name.
    """
    wrong = [
        f"`{name}` is imported from {folder}" if folder else f"`{name}` is missing"
        for name, folder in locations.items()
        if folder is None or folder != home / name
    ]
    for name in locations:
        wrong += [
            f"`{name}` also comes from the package {other}" for other in providers.get(name, ()) if other != "potluck"
        ]
    if not wrong:
        return Check("our modules", Status.OK, f"all from {home}")
    return Check(
        "our modules",
        Status.FAIL,
        "; ".join(dict.fromkeys(wrong)),
        "install Potluck in an environment of its own (`pipx install potluck`), "
        "and do not run it in a folder that has a `cluster` or `node` folder",
    )


def _applies(marker: str, system: str) -> bool:
    """Environment markers as far as our own metadata uses them: extras never, systems by name."""
    if "extra" in marker:
        return False
    match = re.search(r"sys_platform\s*(==|!=)\s*['\"](\w+)['\"]", marker)
    return match is None or (match[2] == system.lower()) == (match[1] == "==")


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0): enough to compare releases."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
