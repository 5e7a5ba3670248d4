"""Target 11: how fast a machine with an empty disk gets a model's weights over gigabit links, beside plain sockets."""

from __future__ import annotations

from statistics import median

from cluster.quantities import GIB, MIB
from tests.bench.loads import Effort
from tests.bench.rows import Row, at_least, unmeasured
from tests.integration.netns import missing
from tests.integration.weight_site import Site, Sources, weight_site

TARGET = 11

_MBIT_S = {"one": 1000, "two": 1000}
_TENSOR_BYTES, _QUICK_TENSOR_BYTES = 24 * MIB, 8 * MIB
_PAIRS = 5
_SHARE_MIN = 0.8


def rows(effort: Effort) -> list[Row]:
    """Everything is on this machine's processors: both ends, the cables, and the hashing of what arrives."""
    absent = missing()
    if absent is not None:
        return [unmeasured(TARGET, "weights over links of 1 Gbit/s", absent)]
    with weight_site(_MBIT_S, _QUICK_TENSOR_BYTES if effort.quick else _TENSOR_BYTES) as site:
        pairs = 1 if effort.quick else _PAIRS
        return [
            *_rows(site, "one link of 1 Gbit/s, the coordinator sends", site.coordinator_alone("one"), pairs),
            *_rows(site, "two links of 1 Gbit/s, a node sends over each", site.nodes_alone(), pairs),
        ]


def _rows(site: Site, name: str, sources: Sources, pairs: int) -> list[Row]:
    """Sockets and ours in turns, so that what else the machine does meets both alike."""
    timed = [(site.plain_bytes_s(sources), site.fetch(sources)) for _ in range(pairs)]
    share = median(fetched.bytes_s / plain for plain, fetched in timed)
    busy_s_per_gib = median(fetched.busy_s for _, fetched in timed) * GIB / site.total_bytes
    note = f"{pairs} in turns, {site.total_bytes // MIB} MiB each"
    return [
        Row(TARGET, f"{name}: rate, to plain sockets", share, "", 1.0, at_least(_SHARE_MIN), note),
        Row(
            TARGET,
            f"{name}: rate",
            median(fetched.bytes_s for _, fetched in timed) / MIB,
            "MiB/s",
            median(plain for plain, _ in timed) / MIB,
            note="the ceiling is what plain sockets carry",
        ),
        Row(TARGET, f"{name}: processor time of the receiver for each GiB", busy_s_per_gib, "s"),
    ]
