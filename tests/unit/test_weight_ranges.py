"""What is still missing of a slice, as runs of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.models.manifest import TensorRecord
from cluster.types import DType
from node.weights.ranges import plan_runs


def _record(name: str, begin: int, size: int, file: str = "a") -> TensorRecord:
    return TensorRecord(name, DType.U8, (size,), file, begin, begin + size, "")


def test_neighbours_become_one_run() -> None:
    runs = plan_runs([_record("b", 18, 5), _record("a", 8, 10), _record("c", 23, 1)], {})
    assert [(run.begin, run.end) for run in runs] == [(8, 24)]


def test_a_gap_or_another_file_begins_a_run() -> None:
    runs = plan_runs([_record("a", 8, 10), _record("b", 19, 5), _record("c", 24, 5, file="z")], {})
    assert [(run.file, run.begin, run.end) for run in runs] == [("a", 8, 18), ("a", 19, 24), ("z", 24, 29)]


def test_a_tensor_that_partly_arrived_begins_a_run_inside_itself() -> None:
    runs = plan_runs([_record("a", 8, 10), _record("b", 18, 5), _record("c", 23, 5)], {"b": 2})
    assert [(run.begin, run.end, run.skip_bytes) for run in runs] == [(8, 18, 0), (20, 28, 2)]


_SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=30)


@given(_SIZES, st.sets(st.integers(0, 29)), st.dictionaries(st.integers(0, 29), st.integers(0, 50)), st.integers(1, 99))
def test_runs_cover_exactly_what_is_missing(
    sizes: list[int], present: set[int], arrived: dict[int, int], run_bytes_max: int
) -> None:
    records, begin = [], 8
    for i, size in enumerate(sizes):
        records.append(_record(str(i), begin, size))
        begin += size
    received = {str(i): min(count, sizes[i]) for i, count in arrived.items() if i < len(sizes)}
    missing = [record for i, record in enumerate(records) if i not in present]
    runs = plan_runs(missing, received, run_bytes_max)
    asked = [byte for run in runs for byte in range(run.begin, run.end)]
    wanted = [byte for t in missing for byte in range(t.begin + received.get(t.name, 0), t.end)]
    assert asked == wanted
    assert all(len(run.tensors) == 1 or run.end - run.tensors[0].begin <= run_bytes_max for run in runs)
