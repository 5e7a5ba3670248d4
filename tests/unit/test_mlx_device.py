"""What the process is told before it computes on an Apple GPU, which is not here: the calls, not their effect."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.errors import UsageError
from cluster.limits import MLX_FREED_BYTES_MAX
from cluster.quantities import GIB
from node.engines.mlx.device import open_device
from node.memory_apple import AppleFacts, apple_report


def told(patch: pytest.MonkeyPatch, **about: object) -> dict[str, int]:
    """What MLX is asked to keep, on a machine whose GPU says this about itself."""
    calls: dict[str, int] = {}
    patch.setattr(mx.metal, "is_available", lambda: True)
    patch.setattr(mx, "device_info", lambda device: about)
    patch.setattr(mx, "set_wired_limit", lambda limit: calls.update(wired=limit))
    patch.setattr(mx, "set_cache_limit", lambda limit: calls.update(freed=limit))
    assert open_device("metal") == mx.Device(mx.gpu)
    return calls


def test_weights_and_cache_stay_in_memory_as_far_as_a_plan_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans take at most the budget; with the buffers that may be kept beside, all of it is within what is wired."""
    calls = told(monkeypatch, max_recommended_working_set_size=48 * GIB)
    assert calls == {"wired": 48 * GIB, "freed": MLX_FREED_BYTES_MAX}
    facts = AppleFacts(64 * GIB, 48 * GIB, 0, False, 1, freed_bytes=MLX_FREED_BYTES_MAX)
    report = apple_report(facts, used_bytes=0, cap_bytes=None, reserve_fraction=0.0)
    assert report.budget_bytes + calls["freed"] == calls["wired"]


@pytest.mark.parametrize("stated", [{}, {"max_recommended_working_set_size": 0}])
def test_a_gpu_that_recommends_nothing_is_not_told_to_keep_anything(
    stated: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(monkeypatch, **stated) == {"freed": MLX_FREED_BYTES_MAX}


def test_without_an_apple_gpu_metal_is_refused() -> None:
    if mx.metal.is_available():
        pytest.skip("there is one here")
    with pytest.raises(UsageError, match="no Apple GPU"):
        open_device("metal")
