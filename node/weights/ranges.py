"""Which byte ranges to ask for: few, long, and none that is here already. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.models.manifest import TensorRecord
from cluster.quantities import MIB

RUN_BYTES_MAX = 16 * MIB
"""Long enough that asking costs little (it takes a tenth of a second at 1 Gbit/s), short enough that a kill loses
little that was not yet synced to disk, and that an engine gets its first tensors soon: runs begun together end
together."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tensors that lie back to back in one file. The first `skip_bytes` of the first one are on disk."""

    file: str
    tensors: tuple[TensorRecord, ...]
    skip_bytes: int

    @property
    def begin(self) -> int:
        return self.tensors[0].begin + self.skip_bytes

    @property
    def end(self) -> int:
        return self.tensors[-1].end

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin


def plan_runs(
    missing: Iterable[TensorRecord], received_bytes: Mapping[str, int], run_bytes_max: int = RUN_BYTES_MAX
) -> tuple[Run, ...]:
    """Merge neighbours into runs. A tensor that has partly arrived begins a run, which resumes inside it; one
    longer than a run is a run of its own."""
    runs: list[Run] = []
    open_run: list[TensorRecord] = []
    skip_bytes = 0
    for tensor in sorted(missing, key=lambda tensor: (tensor.file, tensor.begin, tensor.end)):
        arrived_bytes = received_bytes.get(tensor.name, 0)
        joins = (
            bool(open_run)
            and arrived_bytes == 0
            and (tensor.file, tensor.begin) == (open_run[-1].file, open_run[-1].end)
            and tensor.end - open_run[0].begin <= run_bytes_max
        )
        if open_run and not joins:
            runs.append(Run(open_run[0].file, tuple(open_run), skip_bytes))
            open_run = []
        if not open_run:
            skip_bytes = arrived_bytes
        open_run.append(tensor)
    if open_run:
        runs.append(Run(open_run[0].file, tuple(open_run), skip_bytes))
    return tuple(runs)
