"""Memory budgets: main memory, within control groups too, Apple's unified memory, GPUs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from cluster.errors import UsageError
from cluster.nodes import GroupMemory, Pressure
from cluster.quantities import GIB, MIB
from cluster.types import Backend
from node import memory_cuda
from node.hardware import Device, measure_memory
from node.memory_apple import AppleFacts, apple_report
from node.memory_cgroup import CgroupMemory
from node.memory_cuda import CONTEXT_BYTES, LIBRARY_BYTES, GpuMemory, cuda_report
from node.memory_ram import RamFacts, ram_report

# -- Main memory -----------------------------------------------------------------------------------------


def test_ram_is_what_is_available_less_the_reserve() -> None:
    report = ram_report(RamFacts(32 * GIB, 24 * GIB), used_bytes=0, cap_bytes=None, reserve_fraction=None)
    assert report.budget_bytes == report.host_budget_bytes == 24 * GIB - int(32 * GIB * 0.15)
    assert report.explained == "32.0 GiB RAM, 24.0 GiB available, 15 % kept back"


def test_a_budget_is_the_same_before_and_after_a_load() -> None:
    before = ram_report(RamFacts(32 * GIB, 24 * GIB), used_bytes=0, cap_bytes=None, reserve_fraction=None)
    after = ram_report(RamFacts(32 * GIB, 14 * GIB), used_bytes=10 * GIB, cap_bytes=None, reserve_fraction=None)
    assert after.budget_bytes == before.budget_bytes
    assert after.used_bytes == 10 * GIB


def test_a_cap_lowers_the_nodes_budget_and_not_the_hosts() -> None:
    facts = RamFacts(32 * GIB, 24 * GIB)
    report = ram_report(facts, used_bytes=0, cap_bytes=8 * GIB, reserve_fraction=0.0)
    assert (report.budget_bytes, report.host_budget_bytes) == (8 * GIB, 24 * GIB)
    assert report.explained.endswith("at most 8.0 GiB by --memory")


def test_a_cap_never_raises_a_budget() -> None:
    report = ram_report(RamFacts(32 * GIB, 4 * GIB), used_bytes=0, cap_bytes=8 * GIB, reserve_fraction=0.0)
    assert report.budget_bytes == 4 * GIB


def test_a_cap_above_the_machines_memory_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--memory asks for 64\.0 GiB, and there are 32\.0 GiB"):
        ram_report(RamFacts(32 * GIB, 24 * GIB), used_bytes=0, cap_bytes=64 * GIB, reserve_fraction=None)


def test_a_full_machine_has_a_budget_of_nothing_rather_than_less() -> None:
    report = ram_report(RamFacts(32 * GIB, 1 * GIB), used_bytes=0, cap_bytes=None, reserve_fraction=None)
    assert (report.budget_bytes, report.host_budget_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("available", "expected"), [(0.11, Pressure.NORMAL), (0.09, Pressure.HIGH), (0.04, Pressure.CRITICAL)]
)
def test_pressure_follows_what_is_available(available: float, expected: Pressure) -> None:
    facts = RamFacts(100 * GIB, int(available * 100 * GIB))
    assert ram_report(facts, used_bytes=0, cap_bytes=None, reserve_fraction=None).pressure is expected


def test_a_control_groups_limit_counts_as_the_machines_size() -> None:
    facts = RamFacts(64 * GIB, 60 * GIB, (CgroupMemory(8 * GIB, 6 * GIB, "a"),))
    report = ram_report(facts, used_bytes=0, cap_bytes=None, reserve_fraction=None)
    assert report.total_bytes == 8 * GIB
    assert report.budget_bytes == 6 * GIB - int(8 * GIB * 0.15)
    assert "limited to 8.0 GiB by its control group" in report.explained


def test_what_the_machine_and_each_group_have_for_all_their_nodes_is_told_apart() -> None:
    groups = (CgroupMemory(32 * GIB, 20 * GIB, "outer"), CgroupMemory(8 * GIB, 8 * GIB, "inner"))
    facts = RamFacts(64 * GIB, 60 * GIB, groups)
    report = ram_report(facts, used_bytes=GIB, cap_bytes=4 * GIB, reserve_fraction=0.25)
    assert report.budget_bytes == 4 * GIB
    assert report.groups == (GroupMemory("outer", (20 + 1 - 8) * GIB), GroupMemory("inner", (8 - 2) * GIB))
    assert report.host_budget_bytes == (60 + 1 - 16) * GIB


def test_what_the_machine_keeps_back_is_no_smaller_groups_business() -> None:
    """A lone node in a group keeps the group's reserve, however full the machine is beside it."""
    facts = RamFacts(64 * GIB, 8 * GIB, (CgroupMemory(8 * GIB, 8 * GIB, "a"),))
    report = ram_report(facts, used_bytes=0, cap_bytes=None, reserve_fraction=0.25)
    assert report.budget_bytes == report.host_budget_bytes == 6 * GIB


def test_this_machine_has_a_budget_below_its_memory() -> None:
    report = measure_memory(Device(Backend.TORCH, "cpu", "this one"))
    assert 0 < report.budget_bytes < report.total_bytes
    assert report.used_bytes > 5 * MIB


def test_what_is_kept_back_and_what_others_use_make_up_the_rest_of_the_memory() -> None:
    ram = RamFacts(32 * GIB, 24 * GIB)
    report = ram_report(ram, used_bytes=0, cap_bytes=None, reserve_fraction=None)
    assert report.reserve_bytes == int(32 * GIB * 0.15)
    assert report.total_bytes - report.reserve_bytes - report.budget_bytes == 8 * GIB  # in use by others
    capped = ram_report(ram, used_bytes=0, cap_bytes=4 * GIB, reserve_fraction=None)
    assert capped.reserve_bytes == 28 * GIB == capped.total_bytes - capped.budget_bytes
    apple = apple_report(_apple(16, 12, person=True), used_bytes=0, cap_bytes=None, reserve_fraction=None)
    assert apple.reserve_bytes == 10 * GIB == apple.total_bytes - apple.budget_bytes
    idle = GpuMemory(24 * GIB, 24 * GIB, None)
    cuda = cuda_report(idle, (), used_bytes=None, cap_bytes=None, reserve_fraction=0.1)
    assert cuda.reserve_bytes == cuda.total_bytes - cuda.budget_bytes == 640 * MIB + int(2.4 * GIB)


# -- Apple -----------------------------------------------------------------------------------------------


def _apple(total_gib: int, working_set_gib: float, *, person: bool = False, wired_gib: int = 0) -> AppleFacts:
    return AppleFacts(total_gib * GIB, int(working_set_gib * GIB), wired_gib * GIB, person, 1)


def _apple_budget(facts: AppleFacts, reserve: float | None = None) -> int:
    return apple_report(facts, used_bytes=0, cap_bytes=None, reserve_fraction=reserve).budget_bytes


def test_a_mac_gives_metals_working_set_less_15_percent() -> None:
    assert _apple_budget(_apple(128, 96)) == 96 * GIB - int(128 * GIB * 0.15)


def test_a_mac_with_someone_at_the_screen_keeps_6_gib_at_least() -> None:
    assert _apple_budget(_apple(16, 12, person=True)) == 6 * GIB
    assert _apple_budget(_apple(16, 12)) == 12 * GIB - int(16 * GIB * 0.15)
    assert _apple_budget(_apple(128, 96, person=True)) == _apple_budget(_apple(128, 96))


def test_a_small_mac_with_someone_at_the_screen_gives_nothing_and_says_why() -> None:
    report = apple_report(_apple(8, 5.3, person=True), used_bytes=0, cap_bytes=None, reserve_fraction=None)
    assert report.budget_bytes == 0
    assert "6.0 GiB kept for the person at the machine (--reserve changes it)" in report.explained


def test_what_mlx_may_keep_of_freed_buffers_is_not_offered() -> None:
    keeping = replace(_apple(64, 48), freed_bytes=256 * MIB)
    assert _apple_budget(keeping, reserve=0.0) == 48 * GIB - 256 * MIB


def test_an_explicit_reserve_is_taken_at_its_word() -> None:
    assert _apple_budget(_apple(16, 12, person=True), reserve=0.05) == 12 * GIB - int(16 * GIB * 0.05)


def test_the_owners_wired_limit_replaces_metals_recommendation() -> None:
    assert _apple_budget(_apple(64, 48, wired_gib=56), reserve=0.0) == 56 * GIB


@pytest.mark.parametrize(("level", "expected"), [(1, Pressure.NORMAL), (2, Pressure.HIGH), (4, Pressure.CRITICAL)])
def test_a_mac_reports_the_kernels_own_pressure(level: int, expected: Pressure) -> None:
    facts = AppleFacts(16 * GIB, 12 * GIB, 0, False, level)
    assert apple_report(facts, used_bytes=0, cap_bytes=None, reserve_fraction=None).pressure is expected


# -- CUDA ------------------------------------------------------------------------------------------------


def _cuda(gpu: GpuMemory, *others: GpuMemory, used: int | None = None) -> tuple[int, int]:
    report = cuda_report(gpu, others, used_bytes=used, cap_bytes=None, reserve_fraction=None)
    return report.budget_bytes, report.host_budget_bytes


def test_vram_is_what_is_free_less_context_and_libraries() -> None:
    assert _cuda(GpuMemory(24 * GIB, 23 * GIB, None))[0] == 23 * GIB - CONTEXT_BYTES - LIBRARY_BYTES


def test_a_gpus_budget_is_the_same_before_and_after_a_load_however_it_is_counted() -> None:
    before = _cuda(GpuMemory(24 * GIB, 23 * GIB, None))
    loaded_free = 23 * GIB - CONTEXT_BYTES - 10 * GIB
    assert _cuda(GpuMemory(24 * GIB, loaded_free, None), used=10 * GIB) == before
    assert _cuda(GpuMemory(24 * GIB, loaded_free, 10 * GIB + CONTEXT_BYTES)) == before


def test_a_host_may_give_all_its_gpus() -> None:
    gpu, other, full = (GpuMemory(24 * GIB, free, None) for free in (23 * GIB, 20 * GIB, 0))
    own, host = _cuda(gpu, other, full)
    assert host == own + 20 * GIB - CONTEXT_BYTES - LIBRARY_BYTES


def test_a_gpu_keeps_a_reserve_only_when_asked() -> None:
    gpu = GpuMemory(20 * GIB, 20 * GIB, None)
    asked = cuda_report(gpu, (), used_bytes=None, cap_bytes=None, reserve_fraction=0.1)
    assert asked.budget_bytes == _cuda(gpu)[0] - 2 * GIB
    assert asked.explained.endswith("10 % kept back")


@pytest.mark.parametrize(
    ("free_mib", "expected"), [(128, Pressure.NORMAL), (100, Pressure.HIGH), (32, Pressure.CRITICAL)]
)
def test_a_gpu_is_under_pressure_when_less_is_free_than_a_full_plan_leaves(free_mib: int, expected: Pressure) -> None:
    gpu = GpuMemory(24 * GIB, free_mib * MIB, None)
    assert cuda_report(gpu, (), used_bytes=None, cap_bytes=None, reserve_fraction=None).pressure is expected


def test_a_plan_that_takes_the_whole_budget_leaves_what_libraries_need() -> None:
    budget, _ = _cuda(GpuMemory(24 * GIB, 24 * GIB, None))
    taken = budget + CONTEXT_BYTES  # torch keeps a workspace once it was needed
    full = GpuMemory(24 * GIB, 24 * GIB - taken, taken)
    report = cuda_report(full, (), used_bytes=None, cap_bytes=None, reserve_fraction=None)
    assert (report.budget_bytes, report.pressure) == (budget, Pressure.NORMAL)
    assert full.free_bytes == LIBRARY_BYTES


@dataclass(frozen=True)
class _Nvml:
    """One GPU of 24 GiB, as a driver tells of it inside and outside a container."""

    free_bytes: int
    processes: tuple[SimpleNamespace, ...]
    NVMLError: type[Exception] = OSError

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(total=24 * GIB, free=self.free_bytes)

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> tuple[SimpleNamespace, ...]:
        if not self.processes:
            raise self.NVMLError
        return self.processes


@pytest.mark.parametrize("told", ["by the driver", "without a number", "by torch alone"])
def test_what_this_process_holds_of_a_gpu_stays_in_its_budget(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = 300 * MIB  # whatever it really is
    loaded = SimpleNamespace(pid=os.getpid(), usedGpuMemory=10 * GIB + context if told == "by the driver" else None)
    nvml = _Nvml(23 * GIB - context - 10 * GIB, () if told == "by torch alone" else (loaded,))
    torch = SimpleNamespace(
        cuda=SimpleNamespace(is_initialized=lambda: True, memory_reserved=lambda index: 10 * GIB * (index == 0))
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(memory_cuda, "_nvml", lambda: nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (gpu,) = memory_cuda.read_gpus()
    expected = 23 * GIB - CONTEXT_BYTES - LIBRARY_BYTES
    # A context that was counted by its real size, and not as large as was thought, leaves the rest free.
    assert _cuda(gpu)[0] == (expected if told == "by the driver" else expected + CONTEXT_BYTES - context)
