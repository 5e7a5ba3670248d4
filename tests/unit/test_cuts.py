"""Layers that attend to the keys of an earlier one are never parted from it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cluster.errors import ModelError
from cluster.models.cuts import keys_of, legal_cuts

WINDOW, ALL = "sliding_attention", "full_attention"


def cuts_of(kinds: list[str], sharing: int) -> frozenset[int]:
    return legal_cuts(keys_of({"layer_types": kinds}, len(kinds), sharing, "model"))


def test_a_model_of_layers_with_keys_of_their_own_may_be_cut_anywhere() -> None:
    assert legal_cuts(keys_of({}, 4, 0, "model")) == {0, 1, 2, 3}


def test_sharing_layers_attend_to_the_last_of_their_kind_with_keys_of_its_own() -> None:
    kinds = [WINDOW, ALL, WINDOW, ALL, WINDOW, WINDOW, ALL]
    assert keys_of({"layer_types": kinds}, 7, 3, "model") == (0, 1, 2, 3, 2, 2, 3)


def test_the_small_gemma_4_is_cut_in_its_first_layers_alone() -> None:
    """35 layers of which the last 20 share: those with a window the keys of layer 13, the others those of 14."""
    kinds = [ALL if (layer + 1) % 5 == 0 else WINDOW for layer in range(35)]
    assert cuts_of(kinds, 20) == set(range(14))


def test_a_kind_that_nobody_shares_holds_no_cut_back() -> None:
    assert cuts_of([WINDOW, WINDOW, ALL, ALL], 1) == {0, 1, 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "expected 3 layer_types"),
        ({"layer_types": [ALL, ALL]}, "expected 3 layer_types"),
        ({"layer_types": [ALL, [], ALL]}, "expected 3 layer_types"),
        ({"layer_types": [WINDOW, WINDOW, ALL]}, "none of full_attention"),
    ],
)
def test_keys_that_nobody_makes_are_refused(config: Mapping[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        keys_of(config, 3, 1, "model")


@pytest.mark.parametrize("sharing", [3, 4, 1 << 40])
def test_some_layer_has_keys_of_its_own(sharing: int) -> None:
    with pytest.raises(ModelError, match="there is none"):
        keys_of({"layer_types": [ALL] * 3}, 3, sharing, "model")
