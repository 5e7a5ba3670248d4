"""Which devices this machine can compute on, and how much memory a node on one of them may hold.

Choosing is pure, over the machine's facts; finding the facts imports neither torch nor mlx, so that commands stay
quick. Does not know what the memory is for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.errors import UsageError
from cluster.nodes import MemoryReport
from cluster.types import Backend
from node.memory_apple import apple_report, chip_name, read_apple
from node.memory_cuda import cuda_report, list_gpus, read_gpus
from node.memory_ram import process_bytes, ram_report, read_ram

AUTO: Final = "auto"

_DEVICE: Final = re.compile(r"cpu|mps|metal|cuda(:\d{1,3})?")
_BACKEND_OF: Final = {"cuda": Backend.TORCH, "mps": Backend.TORCH, "metal": Backend.MLX}
_MODULES: Final = {Backend.TORCH: ("torch", "transformers", "safetensors"), Backend.MLX: ("mlx", "mlx_lm")}
_PACKAGES: Final = {Backend.TORCH: ("torch", "transformers"), Backend.MLX: ("mlx", "mlx-lm")}


@dataclass(frozen=True, slots=True)
class Device:
    """Something to compute on, with the engine that will."""

    backend: Backend
    device: str  # cpu, cuda:0, mps for torch; cpu, metal for mlx
    name: str  # as its maker calls it


@dataclass(frozen=True, slots=True)
class Machine:
    """What the choice of a device depends on."""

    chip: str
    apple_silicon: bool
    gpus: tuple[str, ...]  # NVIDIA's, by name, in CUDA's order
    engines: frozenset[Backend]
    torch_build: str  # the local part of torch's version: cpu, rocm6.4, cu130, or empty for the default build

    @property
    def has_rocm(self) -> bool:
        return self.torch_build.startswith("rocm")


def parse_devices(text: str) -> tuple[str, ...]:
    """`cpu`, `cuda:0,cuda:1`, `cuda` (the first GPU), `mps`, `metal`; empty for `auto`."""
    if text.strip() == AUTO:
        return ()
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not _DEVICE.fullmatch(part):
            raise UsageError(f"expected auto, cpu, cuda, cuda:N, mps or metal for --device, found {part!r}")
    devices = tuple("cuda:0" if part == "cuda" else part for part in parts)
    if len(set(devices)) != len(devices):
        raise UsageError(f"--device {text} names a device twice; one node runs on each, so name it once")
    return devices


def detect_devices(backend: str = AUTO, device: str = AUTO, machine: Machine | None = None) -> tuple[Device, ...]:
    """The devices to run a node on, one each. Raises UsageError where the wish and the machine do not match."""
    machine = machine or read_machine()
    wanted = _parse_backend(backend)
    if not machine.engines:
        raise UsageError(
            "no engine is installed: run `pipx install 'potluck[mlx]'` on Apple Silicon, "
            "`pipx install 'potluck[torch]'` elsewhere"
        )
    if wanted is not None and wanted not in machine.engines:
        raise UsageError(f"the {wanted} engine is not installed: run `pipx install 'potluck[{wanted}]'`")
    names = parse_devices(device) or _auto(wanted, machine)
    return tuple(_device(name, wanted, machine) for name in names)


def engine_version(backend: Backend) -> str:
    """`torch 2.13.0, transformers 5.23.0`, from the installed packages' metadata."""
    return ", ".join(f"{package} {_version(package) or 'missing'}" for package in _PACKAGES[backend])


def measure_memory(
    device: Device,
    *,
    memory_cap_bytes: int | None = None,
    reserve_fraction: float | None = None,
    used_bytes: int | None = None,
    root: Path = Path("/"),
) -> MemoryReport:
    """Measure now. `used_bytes` is what the engine holds on the device (weights and cache); None counts the whole
    process. It counts as available, since a new plan replaces it: so a budget is the same before and after a load.
    Other nodes of the same host are not known here, and what they hold is not available."""
    if device.device.startswith("cuda"):
        index = int(device.device.partition(":")[2])
        gpus = read_gpus()
        others = gpus[:index] + gpus[index + 1 :]
        return cuda_report(
            gpus[index], others, used_bytes=used_bytes, cap_bytes=memory_cap_bytes, reserve_fraction=reserve_fraction
        )
    used = process_bytes() if used_bytes is None else used_bytes
    if device.device in ("metal", "mps"):
        apple = read_apple(device.backend)
        return apple_report(apple, used_bytes=used, cap_bytes=memory_cap_bytes, reserve_fraction=reserve_fraction)
    ram = read_ram(root)
    return ram_report(ram, used_bytes=used, cap_bytes=memory_cap_bytes, reserve_fraction=reserve_fraction)


def read_machine() -> Machine:
    """This machine's facts."""
    engines = (b for b, modules in _MODULES.items() if all(map(importlib.util.find_spec, modules)))
    return Machine(
        chip=_chip(),
        apple_silicon=platform.system() == "Darwin" and platform.machine() == "arm64",
        gpus=tuple(gpu.name for gpu in list_gpus()),
        engines=frozenset(engines),
        torch_build=(_version("torch") or "").partition("+")[2],
    )


def _parse_backend(text: str) -> Backend | None:
    if text == AUTO:
        return None
    try:
        return Backend(text)
    except ValueError as error:
        raise UsageError(f"expected auto, torch or mlx for --backend, found {text!r}") from error


def _auto(wanted: Backend | None, machine: Machine) -> tuple[str, ...]:
    """The fastest engine that is installed: Metal through MLX, GPUs through torch, else the processor."""
    torch = Backend.TORCH in machine.engines and wanted is not Backend.MLX
    mlx = Backend.MLX in machine.engines and wanted is not Backend.TORCH
    if mlx and machine.apple_silicon:
        return ("metal",)
    if torch and machine.gpus and machine.torch_build != "cpu":
        return tuple(f"cuda:{index}" for index in range(len(machine.gpus)))
    if torch and machine.has_rocm:
        return ("cuda:0",)
    if torch and machine.apple_silicon:
        return ("mps",)
    return ("cpu",)


def _device(name: str, wanted: Backend | None, machine: Machine) -> Device:
    kind, _, index = name.partition(":")
    preferred = Backend.TORCH if Backend.TORCH in machine.engines else Backend.MLX
    backend = _BACKEND_OF.get(kind) or wanted or preferred
    if wanted is not None and backend is not wanted:
        raise UsageError(f"--device {name} is for the {backend} engine, and --backend asks for {wanted}")
    if backend not in machine.engines:
        raise UsageError(f"--device {name} needs the {backend} engine: run `pipx install 'potluck[{backend}]'`")
    if kind in ("metal", "mps") and not machine.apple_silicon:
        raise UsageError(f"--device {name} is for Apple Silicon; this machine has cpu{_gpu_list(machine)}")
    if kind != "cuda":
        return Device(backend, name, machine.chip)
    if machine.has_rocm:
        return Device(backend, name, "AMD GPU")
    if not machine.gpus:
        raise UsageError(f"--device {name} needs an NVIDIA GPU, and no driver answers here; use --device cpu")
    if machine.torch_build == "cpu":
        raise UsageError(f"--device {name} needs torch's GPU build, found its CPU build; install potluck[torch] anew")
    if int(index) >= len(machine.gpus):
        raise UsageError(f"there is no {name}: this machine has cpu{_gpu_list(machine)}; see `potluck doctor`")
    return Device(backend, name, machine.gpus[int(index)])


def _gpu_list(machine: Machine) -> str:
    return "".join(f", cuda:{index} ({name})" for index, name in enumerate(machine.gpus))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _chip() -> str:
    """What the processor calls itself."""
    if platform.system() == "Darwin":
        return chip_name() or platform.machine()
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()
