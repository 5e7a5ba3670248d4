"""GPUs as NVIDIA's management library (NVML) sees them, and the budget of a node on one of them.

NVML answers without creating a CUDA context and without importing torch. Where it is missing but torch has a GPU
all the same (AMD's ROCm), torch is asked.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cluster.errors import UsageError
from cluster.nodes import MemoryReport
from cluster.quantities import MIB, format_bytes
from node.memory_budget import finish, percent, pressure_of_free

CONTEXT_BYTES: Final = 512 * MIB
"""A CUDA context with torch's kernels: 300 to 520 MiB by what is published for consumer cards up to the H100.
Taken on trust: the project has measured none yet."""

LIBRARY_BYTES: Final = 128 * MIB
"""What is in no plan: workspaces of cuBLAS and cuBLASLt (torch asks for 32 MiB each on Hopper, for 8 MiB or less
before it), and the unused ends of the segments that torch's allocator takes from the driver (2 or 20 MiB, or one
tensor). What steps need is in every plan (`placement.activations`). Taken on trust, like the context."""

_HIGH_FREE_BYTES: Final = LIBRARY_BYTES
_CRITICAL_FREE_BYTES: Final = LIBRARY_BYTES // 2
"""A full plan leaves so much: torch keeps what a long prefill took. Less means that others take memory, or that the
libraries take more than they should."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process may use, in CUDA's numbering."""

    handle: str  # what NVML finds it by: its number, or its UUID
    name: str


@dataclass(frozen=True, slots=True)
class Driver:
    """What the driver answers, for people."""

    version: str  # empty where there is none
    problem: str  # why it cannot be used; empty when it can, and where there is none


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """One GPU's memory now. `process_bytes` is this process's own share, context included, where somebody tells."""

    total_bytes: int
    free_bytes: int
    process_bytes: int | None


def cuda_report(
    gpu: GpuMemory,
    others: tuple[GpuMemory, ...],
    *,
    used_bytes: int | None,
    cap_bytes: int | None,
    reserve_fraction: float | None,
) -> MemoryReport:
    """What is free, plus what this node already uses, less context and libraries. Nobody's desktop needs a
    reserve here: what it uses is not free to begin with. The host's budget is that of all its GPUs."""
    own = used_bytes if used_bytes is not None else gpu.process_bytes or 0
    fraction = reserve_fraction or 0.0
    budget = _within(gpu, used_bytes) - int(gpu.total_bytes * fraction)
    elsewhere = sum(max(0, _within(other, None) - int(other.total_bytes * fraction)) for other in others)
    facts = [
        f"{format_bytes(gpu.total_bytes)} VRAM",
        f"{format_bytes(gpu.free_bytes)} free",
        f"less {format_bytes(CONTEXT_BYTES + LIBRARY_BYTES)} for context and libraries",
    ]
    return finish(
        total_bytes=gpu.total_bytes,
        reserve_bytes=CONTEXT_BYTES + LIBRARY_BYTES + int(gpu.total_bytes * fraction),
        budget_bytes=budget,
        host_budget_bytes=max(0, budget) + elsewhere,
        used_bytes=own,
        cap_bytes=cap_bytes,
        pressure=pressure_of_free(gpu.free_bytes, _HIGH_FREE_BYTES, _CRITICAL_FREE_BYTES),
        facts=[*facts, f"{percent(fraction)} kept back"] if fraction else facts,
    )


def _within(gpu: GpuMemory, used_bytes: int | None) -> int:
    """What weights, cache and workspace may take, the same before and after a load."""
    if gpu.process_bytes:
        return gpu.free_bytes + gpu.process_bytes - CONTEXT_BYTES - LIBRARY_BYTES
    if used_bytes:  # an engine that holds something has its context already
        return gpu.free_bytes + used_bytes - LIBRARY_BYTES
    return gpu.free_bytes - CONTEXT_BYTES - LIBRARY_BYTES


def visible_handles(environ: Mapping[str, str], count: int) -> tuple[str, ...]:
    """The GPUs that CUDA will number 0, 1, ... for this process. CUDA ignores what follows an invalid entry."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(str(index) for index in range(count))
    handles = []
    for entry in (part.strip() for part in chosen.split(",")):
        if not (entry.startswith(("GPU-", "MIG-")) or (entry.isdigit() and int(entry) < count)):
            break
        handles.append(entry)
    return tuple(handles)


def list_gpus() -> tuple[Gpu, ...]:
    """Every GPU that this process may use; none where there is no NVIDIA driver."""
    nvml = _nvml()
    if nvml is None:
        return ()
    handles = visible_handles(os.environ, int(nvml.nvmlDeviceGetCount()))
    return tuple(Gpu(handle, _text(nvml.nvmlDeviceGetName(_find(nvml, handle)))) for handle in handles)


def read_gpus() -> tuple[GpuMemory, ...]:
    """The memory of each of `list_gpus()`, in the same order."""
    nvml = _nvml()
    if nvml is None:
        return _read_from_torch()
    handles = visible_handles(os.environ, int(nvml.nvmlDeviceGetCount()))
    return tuple(_read_gpu(nvml, _find(nvml, handle), index) for index, handle in enumerate(handles))


def _read_gpu(nvml: Any, device: Any, index: int) -> GpuMemory:
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(device)
    except nvml.NVMLError:  # not every driver lets containers see processes
        processes = []
    own = next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
    return GpuMemory(int(memory.total), int(memory.free), own or _held_by_torch(index))


def _held_by_torch(index: int) -> int | None:
    """What this process has of a GPU where NVML does not tell (in many containers, on WSL): what torch has taken from
    the driver, and a context. None before the first use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    reserved = int(torch.cuda.memory_reserved(index))
    return reserved + CONTEXT_BYTES if reserved else None


def _read_from_torch() -> tuple[GpuMemory, ...]:
    """Only a node on an AMD GPU comes here, and it imports torch anyway."""
    import torch

    if not torch.cuda.is_available():
        raise UsageError("no GPU answers: the NVIDIA driver is missing; `potluck doctor` looks for the cause")
    pairs = (torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count()))
    return tuple(GpuMemory(int(total), int(free), _held_by_torch(index)) for index, (free, total) in enumerate(pairs))


def _find(nvml: Any, handle: str) -> Any:
    try:
        if handle.isdigit():
            return nvml.nvmlDeviceGetHandleByIndex(int(handle))
        return nvml.nvmlDeviceGetHandleByUUID(handle)
    except nvml.NVMLError as error:
        raise UsageError(f"the GPU {handle} cannot be used: {error}; check CUDA_VISIBLE_DEVICES") from error


def read_driver() -> Driver:
    """The state of the NVIDIA driver, for `potluck doctor`."""
    nvml, problem = _start_nvml()
    return Driver(_text(nvml.nvmlSystemGetDriverVersion()) if nvml else "", problem)


def _nvml() -> Any | None:
    return _start_nvml()[0]


@functools.cache
def _start_nvml() -> tuple[Any | None, str]:
    """NVML, or why not. Once for the life of the process: starting it takes tens of milliseconds."""
    try:
        import pynvml
    except ImportError:  # not installed on macOS
        return None, ""
    # CUDA numbers the fastest GPU first unless told otherwise, NVML goes by slot. They must agree before torch
    # is imported, here and in the processes that we start.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        absent = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        return None, "" if absent else str(error)
    return pynvml, ""


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
