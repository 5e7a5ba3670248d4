"""Doctor's verdicts, on machines that are ill in one way each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.cli import doctor as command
from cluster.cli.check import Check, Status
from cluster.cli.doctor_machine import check_disk, check_memory, check_state, find_holders
from cluster.cli.doctor_software import (
    TorchProbe,
    check_engines,
    check_foreign,
    check_gpu,
    check_mlx_pair,
    check_packages,
    check_python,
)
from cluster.nodes import MemoryReport, Pressure
from cluster.quantities import GIB
from cluster.state_dir import StateDir
from cluster.types import Backend
from node.hardware import Machine
from node.memory_cuda import Driver

PC = Machine("Intel Core", apple_silicon=False, gpus=(), engines=frozenset({Backend.TORCH}), torch_build="")
GPU_BOX = dataclasses.replace(PC, gpus=("RTX 4090",))
DRIVER = Driver("570.86", "")
TORCH = TorchProbe("2.13.0+cu130", "13.0", sees_gpu=True, problem="")
REQUIREMENTS = (
    "grpcio>=1.85.1", "huggingface_hub>=1.0", 'nvidia-ml-py>=12.560; sys_platform != "darwin"',
    'torch>=2.11; extra == "torch"', 'mlx[cpu]<0.33,>=0.32; sys_platform == "linux" and extra == "mlx"',
)  # fmt: skip
INSTALLED = {"grpcio": "1.86.0", "huggingface-hub": "1.2.3", "nvidia-ml-py": "13.1"}


# -- Software --------------------------------------------------------------------------------------------


def test_an_old_python_fails() -> None:
    assert check_python((3, 11, 0)).status is Status.OK
    assert check_python((3, 10, 14)).status is Status.FAIL


def test_packages_are_checked_without_extras_and_other_systems() -> None:
    assert check_packages(REQUIREMENTS, INSTALLED, "Linux").status is Status.OK
    without_nvml = {name: version for name, version in INSTALLED.items() if name != "nvidia-ml-py"}
    assert check_packages(REQUIREMENTS, without_nvml, "Darwin").status is Status.OK
    assert check_packages(REQUIREMENTS, without_nvml, "Linux").found == "nvidia-ml-py is missing"


def test_a_package_that_is_too_old_is_named_with_both_versions() -> None:
    check = check_packages(REQUIREMENTS, {**INSTALLED, "grpcio": "1.9.0"}, "Linux")
    assert (check.status, check.found) == (Status.FAIL, "grpcio is 1.9.0, older than 1.85.1")


def test_a_machine_without_an_engine_may_still_coordinate() -> None:
    versions = {Backend.TORCH: "torch 2.13.0", Backend.MLX: "mlx 0.32.4"}
    assert check_engines(PC, versions).found == "torch 2.13.0"
    check = check_engines(dataclasses.replace(PC, engines=frozenset(), apple_silicon=True), versions)
    assert check.status is Status.WARN
    assert "potluck[mlx]" in check.do


@pytest.mark.parametrize(
    ("mlx", "halves", "system", "expected"),
    [
        ("0.32.4", {"mlx-cpu": "0.32.4"}, "Linux", Status.OK),
        ("0.32.4", {"mlx-cpu": "0.32.3"}, "Linux", Status.FAIL),
        ("0.32.4", {}, "Linux", Status.FAIL),
        ("0.32.4", {}, "Darwin", None),
        (None, {}, "Linux", None),
    ],
)
def test_mlx_and_its_linux_half_must_be_of_one_version(
    mlx: str | None, halves: dict[str, str], system: str, expected: Status | None
) -> None:
    check = check_mlx_pair(mlx, halves, system)
    assert (check and check.status) == expected


def test_the_repair_of_an_mlx_mismatch_names_the_version() -> None:
    check = check_mlx_pair("0.32.4", {"mlx-cpu": "0.32.3"}, "Linux")
    assert check is not None
    assert check.do == "run `pip install mlx-cpu==0.32.4`"


@pytest.mark.parametrize(
    ("driver", "machine", "torch", "expected", "words"),
    [
        (Driver("", ""), PC, None, Status.OK, "no NVIDIA GPU"),
        (DRIVER, GPU_BOX, TORCH, Status.OK, "can use it"),
        (DRIVER, GPU_BOX, None, Status.WARN, "no torch"),
        (Driver("", "Driver/library version mismatch"), PC, None, Status.FAIL, "version mismatch"),
        (DRIVER, GPU_BOX, TorchProbe("2.13.0+cpu", "", False, ""), Status.FAIL, "is its CPU build"),
        (
            DRIVER,
            GPU_BOX,
            dataclasses.replace(TORCH, sees_gpu=False),
            Status.FAIL,
            "built for CUDA 13.0, cannot use it",
        ),
        (DRIVER, GPU_BOX, TorchProbe("", "", False, "libcudart.so.13: not found"), Status.FAIL, "libcudart"),
    ],
)
def test_the_gpu_the_driver_and_torch_must_fit_each_other(
    driver: Driver, machine: Machine, torch: TorchProbe | None, expected: Status, words: str
) -> None:
    check = check_gpu(driver, machine, torch)
    assert check.status is expected
    assert words in check.found


HOME = Path("/venv/site-packages")
OURS: dict[str, Path | None] = {name: HOME / name for name in ("cluster", "node", "coordinator")}


def test_our_modules_from_one_place_are_fine() -> None:
    assert check_foreign(OURS, HOME, {"cluster": ["potluck"], "node": ["potluck", "potluck"]}).status is Status.OK


@pytest.mark.parametrize(
    ("locations", "providers", "words"),
    [
        ({**OURS, "node": Path("/elsewhere/node")}, {}, "`node` is imported from /elsewhere/node"),
        ({**OURS, "coordinator": None}, {}, "`coordinator` is missing"),
        (OURS, {"cluster": ["potluck", "cluster"]}, "`cluster` also comes from the package cluster"),
    ],
)
def test_a_foreign_module_of_our_name_fails(
    locations: dict[str, Path | None], providers: dict[str, list[str]], words: str
) -> None:
    check = check_foreign(locations, HOME, providers)
    assert (check.status, check.found) == (Status.FAIL, words)
    assert "pipx install potluck" in check.do


# -- Machine ---------------------------------------------------------------------------------------------


def test_a_state_folder_that_will_be_made_is_fine(tmp_path: Path) -> None:
    assert check_state(tmp_path / "new" / "state", {}).status is Status.OK


def test_a_state_folder_below_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = check_state(tmp_path / "file" / "state", {})
    assert check.status is Status.FAIL
    assert "--state DIR" in check.do


def test_a_held_state_folder_is_a_warning_that_names_the_process(tmp_path: Path) -> None:
    with StateDir(tmp_path / "coordinator") as held:
        holders = find_holders(tmp_path)
        check = check_state(tmp_path, holders)
    assert list(holders) == [held.path]
    assert check.status is Status.WARN
    assert f"{held.path} by process" in check.found
    assert find_holders(tmp_path) == {}


@pytest.mark.parametrize(("free_gib", "expected"), [(100.0, Status.OK), (5.0, Status.WARN), (0.5, Status.FAIL)])
def test_a_disk_is_judged_by_its_room(free_gib: float, expected: Status, tmp_path: Path) -> None:
    assert check_disk(tmp_path, int(free_gib * GIB)).status is expected


@pytest.mark.parametrize(
    ("budget", "pressure", "expected"),
    [(8 * GIB, Pressure.NORMAL, Status.OK), (0, Pressure.NORMAL, Status.WARN), (8 * GIB, Pressure.HIGH, Status.WARN)],
)
def test_memory_that_cannot_be_offered_is_a_warning(budget: int, pressure: Pressure, expected: Status) -> None:
    report = MemoryReport(budget, budget, 0, 16 * GIB, pressure, "16.0 GiB RAM")
    assert check_memory("memory", report).status is expected


# -- The command -----------------------------------------------------------------------------------------


def _examining(*checks: Check) -> Callable[[Path], Iterator[Check]]:
    return lambda folder: iter(checks)


OK = Check("python", Status.OK, "3.12.1")
WARN = Check("disk", Status.WARN, "2 GiB", "free some")
FAIL = Check("multicast", Status.FAIL, "silent [eth0]", "name the machines")


def test_warnings_alone_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_examine", _examining(OK, WARN))
    assert command.doctor(False, None) == 0


def test_a_failure_ends_with_1_and_says_what_to_do_in_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_examine", _examining(OK, FAIL))
    assert command.doctor(False, None) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok   python: 3.12.1", "fail multicast: silent [eth0]", "     do: name the machines", "", "failed: multicast",
    ]  # fmt: skip


def test_json_is_one_document_with_every_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_examine", _examining(OK, FAIL))
    assert command.doctor(True, None) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert document["checks"][1] == {
        "name": "multicast", "status": "fail", "found": "silent [eth0]", "do": "name the machines",
    }  # fmt: skip


def test_a_check_that_breaks_fails_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> list[Check]:
        raise RuntimeError("no such counter")

    for name in ("_software", "_network", "_local_network"):
        monkeypatch.setattr(command, name, list)
    monkeypatch.setattr(command, "_memory", broken)
    checks = list(command._examine(tmp_path))
    assert [(c.name, c.status) for c in checks if c.status is Status.FAIL] == [("memory", Status.FAIL)]
    assert "no such counter" in checks[0].found
    assert any(check.name == "state folder" for check in checks)


def test_a_failure_without_advice_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="does not say what to do"):
        Check("x", Status.FAIL, "broken")
