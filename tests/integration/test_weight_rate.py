"""How much of its link a source uses, alone and beside others: hardly less than plain sockets get through the same
cables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.netns import require_lan
from tests.integration.weight_site import Site, Sources, weight_site

_MBIT_S = {"fast": 150, "slow": 75}
"""Little, so that a busy machine's processor is no part of it."""

_TENSOR_BYTES = 6 * 1024 * 1024
_SHARE_MIN = 0.8
_ATTEMPTS = 3  # what else this machine does only ever makes it slower


@pytest.fixture
def site() -> Iterator[Site]:
    require_lan()
    with weight_site(_MBIT_S, _TENSOR_BYTES) as made:
        yield made


def _assert_nearly_as_fast(site: Site, sources: Sources) -> None:
    """Each attempt is compared with what plain sockets got just before it."""
    shares = []
    for _ in range(_ATTEMPTS):
        plain_bytes_s = site.plain_bytes_s(sources)
        shares.append(site.fetch(sources).bytes_s / plain_bytes_s)
        if shares[-1] >= _SHARE_MIN:
            break
    assert max(shares) >= _SHARE_MIN, shares


@pytest.mark.root
def test_the_coordinator_alone_uses_its_link(site: Site) -> None:
    _assert_nearly_as_fast(site, site.coordinator_alone("fast"))


@pytest.mark.root
def test_unequal_sources_together_use_their_links(site: Site) -> None:
    _assert_nearly_as_fast(site, site.nodes_alone())
