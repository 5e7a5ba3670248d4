"""Where MLX computes, and the process-wide settings that go with it.

MLX binds unfinished work to the thread that began it. So whatever outlives a call is evaluated within the call,
and every call names its device: then a stage may be loaded on one thread and run on another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from cluster.errors import UsageError
from cluster.limits import MLX_FREED_BYTES_MAX
from node.host_allocator import give_back_when_freed


def open_device(name: str) -> mx.Device:
    """`cpu` or `metal` as a device that exists here, with the process prepared for it."""
    if name == "cpu":
        # On the CPU MLX fuses functions by calling a C++ compiler at run time and loading the result from a
        # folder in /tmp. Not every machine has one, and nobody else should be able to put code there.
        mx.disable_compile()
        # Nothing is gained by keeping buffers that the system hands out as quickly, and they would count.
        mx.set_cache_limit(0)
        give_back_when_freed()
        return mx.Device(mx.cpu)
    if name != "metal":
        raise UsageError(f"expected an MLX device, cpu or metal, found {name!r}")
    if not mx.metal.is_available():
        raise UsageError("device metal does not exist: MLX finds no Apple GPU here; run `potluck doctor`")
    device = mx.Device(mx.gpu)
    _wire(device)
    mx.set_cache_limit(MLX_FREED_BYTES_MAX)
    return device


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Buffers freed meanwhile go back to the machine at once: the pieces of a stack of experts, as large as the
    stack, fit nothing that a load makes after them."""
    kept_bytes = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(kept_bytes)


def _wire(device: mx.Device) -> None:
    """Let weights and cache stay resident, or macOS pages them out between two requests."""
    recommended = mx.device_info(device).get("max_recommended_working_set_size")
    if isinstance(recommended, int) and recommended > 0:
        mx.set_wired_limit(recommended)
