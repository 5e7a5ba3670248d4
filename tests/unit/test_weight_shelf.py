"""All models on a node's disk: what goes when room is needed, in which order, and what never goes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.errors import ModelError
from node.weights.shelf import Shelf, allocated_bytes
from tests.stored_weights import SourceModel

_TENSOR_BYTES = 64 * 1024
_MODEL_BYTES = 14 * _TENSOR_BYTES


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceModel]:
    return [SourceModel(tmp_path / f"source{seed}", seed, _TENSOR_BYTES) for seed in range(4)]


def _here(shelf: Shelf) -> set[str]:
    return {manifest.name for store in shelf.stores() if (manifest := store.manifest()) is not None}


def test_the_least_recently_used_model_goes_first_and_no_more_than_needed(
    tmp_path: Path, sources: list[SourceModel]
) -> None:
    shelf = Shelf(tmp_path / "state", int(3.5 * _MODEL_BYTES))
    for source, used_s in zip(sources[:3], (300, 100, 200), strict=True):
        source.put(shelf, used_s=used_s).close()
    incoming = shelf.store(sources[3].manifest.id)
    shelf.make_room(incoming, sources[3].manifest.tensors, _MODEL_BYTES, _MODEL_BYTES)
    assert _here(shelf) == {"m0", "m2"}
    shelf.make_room(incoming, sources[3].manifest.tensors, _MODEL_BYTES, 2 * _MODEL_BYTES)
    assert _here(shelf) == {"m0"}


def test_nothing_goes_while_there_is_room(tmp_path: Path, sources: list[SourceModel]) -> None:
    shelf = Shelf(tmp_path / "state", int(2.5 * _MODEL_BYTES))
    sources[0].put(shelf).close()
    shelf.make_room(shelf.store(sources[1].manifest.id), sources[1].manifest.tensors, _MODEL_BYTES, _MODEL_BYTES)
    assert _here(shelf) == {"m0"}


def test_a_slice_above_the_limit_is_refused_before_anything_goes(tmp_path: Path, sources: list[SourceModel]) -> None:
    shelf = Shelf(tmp_path / "state", int(1.5 * _MODEL_BYTES))
    sources[0].put(shelf).close()
    with pytest.raises(ModelError, match=r"448\.0 KiB too little.*--weights-max"):
        shelf.make_room(shelf.store(sources[1].manifest.id), (), 2 * _MODEL_BYTES, _MODEL_BYTES)
    assert _here(shelf) == {"m0"}


def test_the_slice_in_use_stays_and_other_layers_of_its_model_go(tmp_path: Path, sources: list[SourceModel]) -> None:
    shelf = Shelf(tmp_path / "state", int(0.6 * _MODEL_BYTES))
    source = sources[0]
    first, second = source.manifest.tensors[:7], source.manifest.tensors[7:]
    store = source.put(shelf, first)
    wanted = (*first[4:], *second)
    wanted_bytes = int(0.55 * _MODEL_BYTES)
    shelf.make_room(store, wanted, wanted_bytes, sum(tensor.size_bytes for tensor in second))
    assert [store.is_verified(tensor) for tensor in first] == [False] * 4 + [True] * 3
    assert allocated_bytes(store.folder) < 5 * _TENSOR_BYTES
    for tensor in first[4:]:
        at_source = (source.folder / tensor.file).read_bytes()[tensor.begin : tensor.end]
        assert (store.folder / tensor.file).read_bytes()[tensor.begin : tensor.end] == at_source
    for entry in source.manifest.files:
        assert not entry.header_bytes or store.has_header(entry)
    store.close()


def test_a_full_disk_makes_models_go_below_the_limit_too(
    tmp_path: Path, sources: list[SourceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path / "state", 100 * _MODEL_BYTES)
    sources[0].put(shelf, used_s=1).close()
    sources[1].put(shelf, used_s=2).close()
    usage = shutil._ntuple_diskusage(10**12, 10**12, 0)  # type: ignore[attr-defined]
    roomy = shutil._ntuple_diskusage(10**12, 0, 10**12)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: roomy if "m0" not in _here(shelf) else usage)
    shelf.make_room(shelf.store(sources[2].manifest.id), (), _MODEL_BYTES, _MODEL_BYTES)
    assert _here(shelf) == {"m1"}


def test_nothing_goes_where_it_would_not_make_room_enough(
    tmp_path: Path, sources: list[SourceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else of the model itself is here counts; two others of three that are needed do not help."""
    shelf = Shelf(tmp_path / "state", 100 * _MODEL_BYTES)
    for source in sources[:2]:
        source.put(shelf).close()
    own = sources[2].put(shelf, sources[2].manifest.tensors[:7])
    full = shutil._ntuple_diskusage(10**12, 10**12, 0)  # type: ignore[attr-defined]
    roomy = shutil._ntuple_diskusage(10**12, 0, 10**12)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full if "m1" in _here(shelf) else roomy)
    with pytest.raises(ModelError, match=r"too little even without the 2\.2 MiB of other weights.*--state"):
        shelf.make_room(own, (), 3 * _MODEL_BYTES, 3 * _MODEL_BYTES)
    assert _here(shelf) == {"m0", "m1", "m2"}
    assert all(own.is_verified(tensor) for tensor in sources[2].manifest.tensors[:7])
    shelf.make_room(own, (), int(2.3 * _MODEL_BYTES), int(2.3 * _MODEL_BYTES))
    assert _here(shelf) == {"m2"}
    own.close()


def test_without_a_limit_it_is_a_share_of_the_disk(tmp_path: Path) -> None:
    limit_bytes = Shelf(tmp_path / "state").limit_bytes()
    assert limit_bytes == int(shutil.disk_usage(tmp_path).total * 0.8)
