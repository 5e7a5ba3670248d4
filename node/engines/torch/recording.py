"""Recording a step once and computing it again without Python: CUDA graphs, and what they may take of memory.

A record computes again over the same tensors: whoever has it changes their values in between. Knows nothing of models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Final, Protocol

import torch

from cluster.quantities import MIB

Compute = Callable[[], tuple[torch.Tensor, ...]]
"""Computes from tensors that stay in their places. What it returns is valid until it is called again."""

_ROUNDING_BYTES: Final = 24 * MIB
"""What torch's allocator takes above what is asked of it: blocks of 20 MiB for large tensors, of 2 for small ones."""


class Recorder(Protocol):
    """Something that records what is computed."""

    def record(self, compute: Compute) -> Compute:
        """The same without Python. Calls `compute` some times; raises when it waits for the device or reads a value."""
        ...


class GraphRecorder:
    """Records CUDA graphs. They share one pool of memory, so only one of them may be under way."""

    def __init__(self, device: torch.device, bytes_max: int) -> None:
        self._device = device
        self._bytes_max = bytes_max
        self._taken_bytes = 0
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Compute) -> Compute:
        with torch.cuda.device(self._device):
            needed = self._warm_up(compute) + _ROUNDING_BYTES
            if self._taken_bytes + needed > self._bytes_max:
                raise MemoryError(
                    f"recording it takes up to {needed} bytes; {self._bytes_max - self._taken_bytes} are left of what "
                    "the plan counts for that"
                )
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self._device)
            graph = torch.cuda.CUDAGraph()
            # Only this thread is held to what a recording allows: others of a node never compute.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = compute()
            self._taken_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)

        def replay() -> tuple[torch.Tensor, ...]:
            graph.replay()
            return outputs

        return replay

    def _warm_up(self, compute: Compute) -> int:
        """Compute beside everything else, and tell how many bytes that took at most. Whatever waits for the device is
        refused here already: torch's allocator does not get over a recording that fails."""
        current, checked = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            compute()  # compiles and looks up what must not be recorded, and may wait for that
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it may overlook some; the recording itself does not
                torch.cuda.set_sync_debug_mode("error")
            try:
                compute()
            finally:
                torch.cuda.set_sync_debug_mode(checked)
        current.wait_stream(self._stream)
        return torch.cuda.max_memory_allocated(self._device) - before
