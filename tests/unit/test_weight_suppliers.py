"""Which source gets which run: decisions from measured rates alone."""

from __future__ import annotations

from cluster.models.manifest import TensorRecord
from cluster.quantities import MIB
from cluster.types import DType
from cluster.weight_service import pack_bits, unpack_bits
from node.weights.ranges import Run, plan_runs
from node.weights.suppliers import Supplier, choose, split, taken_back

_SIZE = 8 * MIB
_TENSORS = [
    TensorRecord(name, DType.U8, (_SIZE,), "f", 8 + i * _SIZE, 8 + (i + 1) * _SIZE, "")
    for i, name in enumerate("abcdefgh")
]
_RUNS = plan_runs(_TENSORS, {}, _SIZE)


def _supplier(holds: str | None = None, rate: float | None = None, in_flight: int = 0) -> Supplier:
    return Supplier(holds is None, None if holds is None else set(holds), rate, in_flight)


def _names(run: Run) -> str:
    return "".join(tensor.name for tensor in run.tensors)


def test_a_source_gets_only_what_it_holds() -> None:
    peer = _supplier("c")
    assert choose([peer], _RUNS[:2]) is None
    assert choose([peer], _RUNS) == (peer, _RUNS[2])


def test_the_fastest_source_with_room_comes_first() -> None:
    slow, fast = _supplier("abc", rate=60), _supplier("abc", rate=100)
    assert (choose([slow, fast], _RUNS[:3]) or ())[0] is fast
    fast.in_flight = 2
    assert (choose([slow, fast], _RUNS[:3]) or ())[0] is slow
    slow.in_flight = 2
    assert choose([slow, fast], _RUNS[:3]) is None


def test_each_source_is_measured_first_and_the_coordinator_last_of_these() -> None:
    measured, coordinator, peer = _supplier("a", rate=100), _supplier(), _supplier("a")
    order = []
    for _ in range(3):
        supplier, _run = choose([measured, coordinator, peer], _RUNS[:1]) or (measured, _RUNS[0])
        order.append(supplier)
        supplier.in_flight += 2
    assert [id(s) for s in order] == [id(peer), id(coordinator), id(measured)]


def test_the_coordinator_delivers_what_nobody_else_holds() -> None:
    coordinator, peer = _supplier(rate=100), _supplier("abdefgh", rate=10)
    chosen = choose([coordinator, peer], _RUNS)
    assert chosen == (coordinator, _RUNS[2])


def test_a_source_that_is_left_out_gets_nothing_more() -> None:
    coordinator, peer = _supplier(rate=1), _supplier("abc", rate=100)
    peer.left_out = True
    assert (choose([coordinator, peer], _RUNS) or ())[0] is coordinator


def test_a_source_alone_gets_more_runs_at_a_time() -> None:
    coordinator, peer = _supplier(rate=1, in_flight=3), _supplier("", rate=1)
    assert choose([coordinator, peer], _RUNS) is None
    assert choose([coordinator], _RUNS) is not None


def test_a_slow_source_gets_nothing_that_it_would_bring_after_everything_else() -> None:
    fast, slow = _supplier("abcdefgh", rate=10 * MIB, in_flight=2), _supplier(rate=1 * MIB)
    fast.left_bytes = 3 * _SIZE
    # 24 MiB under way and 64 to give are here in 88 / 11 s = 8 s, which is what the slow one needs for a run.
    assert choose([fast, slow], _RUNS) == (slow, _RUNS[0])
    assert choose([fast, slow], _RUNS[:6]) is None
    slow.left_bytes, fast.left_bytes = 1, 10 * _SIZE
    assert choose([fast, slow], _RUNS[:6]) == (slow, _RUNS[0])
    slow.left_bytes = _SIZE
    assert choose([fast, slow], _RUNS[:6]) is None  # it has something to do for all that time


def test_a_slow_source_gets_what_nobody_faster_holds_however_late_it_comes() -> None:
    fast, slow = _supplier("ab", rate=10 * MIB), _supplier(rate=1)
    assert choose([fast, slow], _RUNS[2:3]) == (slow, _RUNS[2])
    fast.left_out = True
    assert choose([fast, slow], _RUNS[:1]) == (slow, _RUNS[0])


def test_a_source_with_room_takes_over_what_it_would_finish_in_less_than_half_the_time() -> None:
    fast, slow = _supplier("abc", rate=100), _supplier(rate=40, in_flight=1)
    assert taken_back([fast, slow], [(slow, _RUNS[0])]) is _RUNS[0]
    assert taken_back([fast, slow], [(slow, _RUNS[3])]) is None  # it does not hold that
    slow.rate_bytes_s = 60
    assert taken_back([fast, slow], [(slow, _RUNS[0])]) is None  # not so much slower
    slow.in_flight = 2  # each of its runs gets half of its rate
    assert taken_back([fast, slow], [(slow, _RUNS[0]), (slow, _RUNS[1])]) is _RUNS[0]
    fast.in_flight = 1  # and so would this one's
    assert taken_back([fast, slow], [(slow, _RUNS[0]), (slow, _RUNS[1])]) is None
    slow.rate_bytes_s, fast.in_flight = 1, 2
    assert taken_back([fast, slow], [(slow, _RUNS[0])]) is None  # no room


def test_two_equal_sources_take_nothing_from_each_other() -> None:
    one, other = _supplier("abc", rate=100), _supplier("abc", rate=100, in_flight=2)
    assert taken_back([one, other], [(other, _RUNS[0]), (other, _RUNS[1])]) is None


def test_a_run_lies_with_each_source_wholly_or_not_at_all() -> None:
    suppliers = [_supplier("abcd"), _supplier("cdef"), _supplier()]
    runs = split(_TENSORS, {}, suppliers)
    assert sorted("".join(_names(run) for run in runs)) == list("abcdefgh")
    for run in runs:
        for supplier in suppliers[:2]:
            held = [tensor.name in (supplier.holds or ()) for tensor in run.tensors]
            assert all(held) or not any(held)


def test_runs_are_shorter_when_several_sources_share_them() -> None:
    assert len(split(_TENSORS, {}, [_supplier()])) == 4
    assert len(split(_TENSORS, {}, [_supplier(), _supplier("abcdefgh")])) == 8


def test_a_rate_follows_what_is_measured() -> None:
    supplier = _supplier()
    supplier.measured(100, 1.0)
    assert supplier.rate_bytes_s == 100
    supplier.measured(0, 1.0)
    assert supplier.rate_bytes_s == 50


def test_bits_survive_and_a_wrong_number_of_them_is_noticed() -> None:
    flags = [True, False, False, True, True, False, True, False, False, True]
    assert unpack_bits(pack_bits(flags), 10) == flags
    assert unpack_bits(pack_bits(flags), 17) is None
    assert unpack_bits(b"", 1) is None
