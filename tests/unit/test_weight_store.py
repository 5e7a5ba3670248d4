"""A node's own copy of its slice: what is asked for, what is believed, what survives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.errors import WireError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.manifest import Manifest, TensorRecord, build_manifest, to_json
from cluster.types import ModelId
from node.weights.local import holds_slice
from node.weights.ranges import Run, plan_runs
from node.weights.store import Store
from node.weights.writer import RunWriter
from tests.weight_files import write_model

_TENSOR_BYTES = 4096


class _Model:
    """A model folder and a store to copy it into."""

    def __init__(self, path: Path) -> None:
        self.source = write_model(path / "source", tensor_bytes=_TENSOR_BYTES)
        self.manifest: Manifest = build_manifest(open_checkpoint(self.source), name="m", revision="r")
        self.models = path / "models"

    def open(self) -> Store:
        store = Store(self.models, self.manifest.id)
        store.open(self.manifest)
        return store

    def data(self, run: Run) -> bytes:
        return (self.source / run.file).read_bytes()[run.begin : run.end]

    def first_run(self, store: Store, count: int = 3) -> Run:
        tensors = self.manifest.tensors[:count]
        return plan_runs(tensors, {t.name: store.received_bytes(t) for t in tensors})[0]


@pytest.fixture
def model(tmp_path: Path) -> _Model:
    return _Model(tmp_path)


def _write(store: Store, run: Run, data: bytes, *, finish: bool = True) -> list[TensorRecord]:
    writer = RunWriter(store, run)
    writer.resume()
    for begin in range(0, len(data), 1000):
        writer.write(data[begin : begin + 1000])
    if finish:
        writer.finish()
    writer.close()
    return writer.bad


def test_an_empty_store_has_files_of_full_size_that_take_no_room(model: _Model) -> None:
    store = model.open()
    for entry in model.manifest.files:
        if entry.header_bytes:
            status = (store.folder / entry.name).stat()
            assert status.st_size == entry.size_bytes
            assert status.st_blocks == 0
    store.close()


def test_tensors_lie_where_they_lay_at_the_source(model: _Model) -> None:
    store = model.open()
    run = model.first_run(store)
    assert _write(store, run, model.data(run)) == []
    copied = (store.folder / run.file).read_bytes()
    assert copied[run.begin : run.end] == model.data(run)
    assert copied[run.end :] == bytes(len(copied) - run.end)
    store.close()


def test_what_was_verified_is_still_verified_after_a_restart(model: _Model) -> None:
    store = model.open()
    _write(store, model.first_run(store), model.data(model.first_run(store)))
    store.close()
    again = model.open()
    assert [again.is_verified(tensor) for tensor in model.manifest.tensors[:4]] == [True, True, True, False]
    again.close()


def test_a_broken_off_tensor_resumes_at_its_offset_and_is_checked_from_its_beginning(model: _Model) -> None:
    store = model.open()
    run = model.first_run(store)
    _write(store, run, model.data(run)[:6000], finish=False)  # killed in the second tensor
    store.close()
    again = model.open()
    second = model.manifest.tensors[1]
    assert again.received_bytes(second) == 6000 - _TENSOR_BYTES
    rest = plan_runs([second], {second.name: again.received_bytes(second)})[0]
    assert rest.begin == run.begin + 6000
    assert _write(again, rest, model.data(rest)) == []
    assert again.is_verified(second)
    again.close()


def test_a_tensor_received_but_not_yet_synced_is_checked_again_without_receiving(model: _Model) -> None:
    store = model.open()
    run = model.first_run(store, 1)
    _write(store, run, model.data(run), finish=False)
    store.close()
    again = model.open()
    assert not again.is_verified(run.tensors[0])
    rest = model.first_run(again, 1)
    assert rest.begin == rest.end
    assert _write(again, rest, b"") == []
    assert again.is_verified(run.tensors[0])
    again.close()


def test_bytes_that_changed_on_the_disk_before_a_resume_are_found(model: _Model) -> None:
    store = model.open()
    run = model.first_run(store, 1)
    _write(store, run, model.data(run)[:2000], finish=False)
    store.close()
    with (store.folder / run.file).open("r+b") as file:
        file.seek(run.begin + 7)
        file.write(b"\xaa\xbb")
    again = model.open()
    rest = model.first_run(again, 1)
    assert _write(again, rest, model.data(rest)) == [run.tensors[0]]
    assert again.received_bytes(run.tensors[0]) == 0
    again.close()


def test_a_damaged_whole_tensor_is_fetched_from_its_beginning_the_next_time(model: _Model) -> None:
    store = model.open()
    run = model.first_run(store, 1)
    data = bytearray(model.data(run))
    _write(store, run, bytes(data), finish=False)
    with (store.folder / run.file).open("r+b") as file:
        file.seek(run.begin)
        file.write(bytes([data[0] ^ 1]))
    rest = model.first_run(store, 1)
    assert _write(store, rest, b"") == [run.tensors[0]]
    assert model.first_run(store, 1) == run
    store.close()


def test_a_tensor_with_another_hash_is_not_believed_and_its_neighbours_are(model: _Model) -> None:
    store = model.open()
    run = model.first_run(store)
    data = bytearray(model.data(run))
    data[_TENSOR_BYTES + 5] ^= 1
    assert _write(store, run, bytes(data)) == [model.manifest.tensors[1]]
    assert [store.is_verified(tensor) for tensor in run.tensors] == [True, False, True]
    assert store.received_bytes(run.tensors[1]) == 0
    store.close()


@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_file_touched_from_outside_forgets_its_tensors(model: _Model, how: str) -> None:
    store = model.open()
    run = model.first_run(store)
    _write(store, run, model.data(run))
    store.close()
    if how == "deleted":
        (store.folder / run.file).unlink()
    else:
        os.truncate(store.folder / run.file, run.begin + 1)
    again = model.open()
    assert not any(again.is_verified(tensor) for tensor in run.tensors)
    assert (again.folder / run.file).stat().st_size == (model.source / run.file).stat().st_size
    again.close()


def test_a_damaged_manifest_on_disk_is_as_good_as_none(model: _Model) -> None:
    store = model.open()
    store.save_manifest(to_json(model.manifest))
    assert store.manifest() == model.manifest
    store.save_manifest(to_json(model.manifest)[:-9])
    assert store.manifest() is None
    store.close()


@pytest.mark.parametrize("text", ["../../etc", "", "A" * 64, "0" * 63])
def test_a_model_id_that_is_no_hash_never_becomes_a_path(tmp_path: Path, text: str) -> None:
    with pytest.raises(WireError, match="64 hex digits"):
        Store(tmp_path, ModelId(text))


# -- A folder that this machine sees ---------------------------------------------------------------------


def _holds(model: _Model, folder: Path) -> bool:
    weights = [entry for entry in model.manifest.files if entry.header_bytes]
    small = [entry for entry in model.manifest.files if entry.name == "config.json"]
    owned = model.manifest.tensors[2:5]
    return holds_slice(folder, small, weights, owned, model.models.parent / "hashes", lambda _: None)


def test_the_same_files_at_the_same_place_need_no_copy(model: _Model) -> None:
    assert _holds(model, model.source)


def test_a_folder_that_is_not_there_is_not_used(model: _Model, tmp_path: Path) -> None:
    assert not _holds(model, tmp_path / "nowhere")


def test_other_weights_of_the_same_shape_under_the_same_name_are_noticed(model: _Model) -> None:
    """Two machines that each trained /models/ours must not compute one answer from both."""
    tensor = model.manifest.tensors[3]
    with (model.source / tensor.file).open("r+b") as file:
        file.seek(tensor.begin)
        file.write(b"othr")
    assert not _holds(model, model.source)


@pytest.mark.parametrize("change", ["header", "config", "shorter"])
def test_any_other_difference_is_noticed(model: _Model, change: str) -> None:
    path = model.source / ("config.json" if change == "config" else model.manifest.tensors[3].file)
    data = bytearray(path.read_bytes())
    if change == "shorter":
        del data[-1]
    else:
        data[data.index(b'"')] = ord("'")
    path.write_bytes(data)
    assert not _holds(model, model.source)


def test_a_difference_in_what_is_not_owned_does_not_matter(model: _Model) -> None:
    tensor = model.manifest.tensors[7]
    with (model.source / tensor.file).open("r+b") as file:
        file.seek(tensor.begin)
        file.write(b"othr")
    assert _holds(model, model.source)
