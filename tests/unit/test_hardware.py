"""Which devices a machine offers, on machines that this one is not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from cluster.errors import UsageError
from cluster.types import Backend
from node.hardware import Device, Machine, detect_devices, parse_devices, read_machine
from node.memory_cuda import visible_handles

BOTH = frozenset(Backend)
MAC = Machine("Apple M4 Max", apple_silicon=True, gpus=(), engines=BOTH, torch_build="")
BOX = Machine("AMD EPYC", apple_silicon=False, gpus=("RTX 4090", "RTX 3090"), engines=BOTH, torch_build="cu130")
PC = Machine("Intel Core", apple_silicon=False, gpus=(), engines=BOTH, torch_build="cpu")


def _with(machine: Machine, **changes: object) -> Machine:
    return dataclasses.replace(machine, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (MAC, [(Backend.MLX, "metal")]),
        (_with(MAC, engines=frozenset({Backend.TORCH})), [(Backend.TORCH, "mps")]),
        (BOX, [(Backend.TORCH, "cuda:0"), (Backend.TORCH, "cuda:1")]),
        (_with(BOX, torch_build="cpu"), [(Backend.TORCH, "cpu")]),
        (_with(PC, torch_build="rocm6.4"), [(Backend.TORCH, "cuda:0")]),
        (PC, [(Backend.TORCH, "cpu")]),
        (_with(PC, engines=frozenset({Backend.MLX})), [(Backend.MLX, "cpu")]),
        (_with(BOX, engines=frozenset({Backend.MLX})), [(Backend.MLX, "cpu")]),
    ],
)
def test_auto_takes_the_fastest_that_is_installed(machine: Machine, expected: list[tuple[Backend, str]]) -> None:
    assert [(d.backend, d.device) for d in detect_devices(machine=machine)] == expected


def test_one_node_is_made_for_each_named_device() -> None:
    devices = detect_devices("torch", "cuda:1,cpu", BOX)
    assert devices == (Device(Backend.TORCH, "cuda:1", "RTX 3090"), Device(Backend.TORCH, "cpu", "AMD EPYC"))


def test_a_backend_asked_for_is_taken_on_the_cpu_too() -> None:
    assert detect_devices("mlx", "auto", PC)[0].backend is Backend.MLX
    assert detect_devices("mlx", "cpu", PC)[0].backend is Backend.MLX


@pytest.mark.parametrize(
    ("machine", "backend", "device", "message"),
    [
        (_with(PC, engines=frozenset()), "auto", "auto", r"potluck\[mlx\]'` on Apple Silicon.*potluck\[torch\]"),
        (_with(PC, engines=frozenset({Backend.MLX})), "torch", "auto", r"pipx install 'potluck\[torch\]'"),
        (_with(MAC, engines=frozenset({Backend.TORCH})), "auto", "metal", r"needs the mlx engine"),
        (PC, "auto", "metal", "for Apple Silicon; this machine has cpu"),
        (PC, "auto", "cuda:0", "needs an NVIDIA GPU, and no driver answers here"),
        (_with(BOX, torch_build="cpu"), "auto", "cuda:0", "found its CPU build"),
        (BOX, "auto", "cuda:2", r"no cuda:2: this machine has cpu, cuda:0 \(RTX 4090\), cuda:1 \(RTX 3090\)"),
        (BOX, "mlx", "cuda:0", "for the torch engine, and --backend asks for mlx"),
        (BOX, "jax", "auto", "expected auto, torch or mlx for --backend, found 'jax'"),
        (BOX, "auto", "cuda:0,cuda", "names a device twice"),
        (BOX, "auto", "tpu", "expected auto, cpu, cuda"),
        (BOX, "auto", "", "expected auto, cpu, cuda"),
    ],
)
def test_a_wish_that_cannot_be_met_says_what_can(machine: Machine, backend: str, device: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        detect_devices(backend, device, machine)


def test_devices_are_read_as_people_write_them() -> None:
    assert parse_devices("auto") == ()
    assert parse_devices("cuda") == ("cuda:0",)
    assert parse_devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("0", "1", "2")),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, ("2", "0")),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "1,9,0"}, ("1",)),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1c2d,MIG-77"}, ("GPU-1c2d", "MIG-77")),
    ],
)
def test_gpus_are_numbered_as_cuda_will(environ: dict[str, str], expected: tuple[str, ...]) -> None:
    assert visible_handles(environ, 3) == expected


def test_finding_devices_loads_no_engine() -> None:
    # In a process of its own: other tests of this run may have imported them.
    code = (
        "import sys; from node.hardware import read_machine; read_machine(); print({'torch', 'mlx'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_this_machine_can_be_described() -> None:
    assert read_machine().chip
