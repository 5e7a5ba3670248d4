"""What a node says of itself several times a second, and what the coordinator believes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster import messages
from cluster.errors import WireError
from cluster.nodes import Heartbeat, NodePhase
from cluster.plan import Fence
from cluster.types import DeploymentId, Epoch
from tests.clusters import node

BEAT = Heartbeat(
    fence=Fence(DeploymentId("d"), Epoch(3)),
    phase=NodePhase.READY,
    steps_done=9,
    steps_queued=1,
    memory=node("a", 8).memory,
    kv_tokens_used=64,
    sequences=2,
    problem="",
    narrow_error=0.006,
)


def test_a_heartbeat_arrives_as_it_was_sent() -> None:
    for beat in (BEAT, replace(BEAT, narrow_error=None), replace(BEAT, fence=None, narrow_error=0.0)):
        assert messages.heartbeat_in(messages.heartbeat_out(beat)) == beat


@pytest.mark.parametrize("error", [float("nan"), float("inf"), -0.1])
def test_an_error_that_is_no_number_is_not_believed(error: float) -> None:
    with pytest.raises(WireError, match="expected a relative error"):
        messages.heartbeat_in(messages.heartbeat_out(replace(BEAT, narrow_error=error)))
