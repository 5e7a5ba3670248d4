"""A manifest says exactly what a model consists of, and believes nothing that arrives."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelError, WireError
from cluster.models import hashing
from cluster.models.checkpoint import open_checkpoint
from cluster.models.hashing import hash_file
from cluster.models.manifest import Manifest, build_manifest, from_json, is_small_model_file, to_json
from tests.weight_files import write_model

_AN_HOUR_NS = 3600 * 10**9


def _build(folder: Path, cache: Path | None = None, **names: str) -> Manifest:
    return build_manifest(
        open_checkpoint(folder), **({"name": "model", "revision": "local"} | names), cache=cache, progress=None
    )


def _age(folder: Path) -> None:
    """Let the files look as if nobody had touched them for an hour."""
    for path in folder.iterdir():
        old = path.stat().st_mtime_ns - _AN_HOUR_NS
        os.utime(path, ns=(old, old))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", tensor_bytes=4096)


def test_every_tensor_has_the_hash_of_its_own_bytes(folder: Path) -> None:
    manifest = _build(folder)
    assert len(manifest.tensors) == 2 * 6 + 3
    for tensor in manifest.tensors:
        data = (folder / tensor.file).read_bytes()[tensor.begin : tensor.end]
        assert tensor.sha256 == hashlib.sha256(data).hexdigest()
        assert len(data) == tensor.size_bytes


def test_hashes_do_not_depend_on_where_reads_begin_and_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _build(folder)
    monkeypatch.setattr(hashing, "READ_BYTES", 1000)
    assert _build(folder) == whole


def test_every_needed_file_has_its_hash_and_others_are_left_out(folder: Path) -> None:
    manifest = _build(folder)
    assert {entry.name for entry in manifest.files} == {path.name for path in folder.iterdir()} - {"README.md"}
    for entry in manifest.files:
        data = (folder / entry.name).read_bytes()
        assert (entry.size_bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_header_ends_where_the_first_tensor_begins(folder: Path) -> None:
    manifest = _build(folder)
    for entry in manifest.files:
        begins = [tensor.begin for tensor in manifest.tensors if tensor.file == entry.name]
        assert entry.header_bytes == min(begins, default=0)
        if begins:
            header = (folder / entry.name).read_bytes()[: entry.header_bytes]
            assert entry.header_sha256 == hashlib.sha256(header).hexdigest()


def test_the_same_bytes_have_the_same_id_under_any_name(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert _build(copy, name="other", revision="abc").id == _build(folder).id


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_one_other_byte_is_another_model(folder: Path, file: str) -> None:
    before = _build(folder)
    data = bytearray((folder / file).read_bytes())
    place = data.index(b"llama") if b"llama" in data else len(data) - 2
    data[place] ^= 1
    (folder / file).write_bytes(data)
    assert _build(folder).id != before.id


def test_progress_ends_at_the_files_total_size(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(folder)
    _age(folder)
    for _ in range(2):  # read, then remembered
        seen.clear()
        build_manifest(checkpoint, name="m", revision="r", cache=tmp_path / "c", progress=lambda *now: seen.append(now))
        total = sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md")
        assert seen[-1] == (total, total)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# -- What is remembered ----------------------------------------------------------------------------------


def _forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, *_: object) -> None:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(hashing, "_read_and_hash", read)


def test_unchanged_files_are_not_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _age(folder)
    first = _build(folder, tmp_path / "cache")
    _forbid_reading(monkeypatch)
    assert _build(folder, tmp_path / "cache") == first


def test_a_file_with_another_time_is_read_again(folder: Path, tmp_path: Path) -> None:
    _age(folder)
    first = _build(folder, tmp_path / "cache")
    path = folder / "model-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert _build(folder, tmp_path / "cache").id != first.id


def test_a_file_touched_just_now_is_not_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of the clock it could change again without a sign."""
    _build(folder, tmp_path / "cache")
    _forbid_reading(monkeypatch)
    with pytest.raises(AssertionError, match="read again"):
        _build(folder, tmp_path / "cache")


def test_a_damaged_memory_costs_only_time(folder: Path, tmp_path: Path) -> None:
    _age(folder)
    first = _build(folder, tmp_path / "cache")
    entries = list((tmp_path / "cache").iterdir())
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-5])
    assert _build(folder, tmp_path / "cache") == first


def test_a_memory_that_cannot_be_written_keeps_nothing_from_being_served(folder: Path, tmp_path: Path) -> None:
    _age(folder)
    (tmp_path / "cache").write_text("a file, where a folder should be")
    assert _build(folder, tmp_path / "cache") == _build(folder)


def test_a_file_that_shrinks_meanwhile_is_an_error_and_not_a_hash(folder: Path) -> None:
    path = folder / "tokenizer.json"

    def shrink(_: int) -> None:
        os.truncate(path, 1)

    with pytest.raises(ModelError, match="changed while it was read"):
        hash_file(path, [(0, path.stat().st_size)], None, shrink)


def test_overlapping_spans_are_a_programming_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="overlap"):
        hash_file(folder / "config.json", [(0, 4), (3, 8)], None, lambda _: None)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"])
def test_small_files_that_serving_needs_are_known(name: str) -> None:
    assert is_small_model_file(name)


@pytest.mark.parametrize("name", ["README.md", "tokenizer.py", "modeling_llama.py", "pytorch_model.bin", "model.gguf"])
def test_code_and_other_formats_are_not_needed(name: str) -> None:
    assert not is_small_model_file(name)


# -- As JSON ---------------------------------------------------------------------------------------------


def test_a_manifest_survives_the_wire(folder: Path) -> None:
    manifest = _build(folder, name="org/model", revision="abc")
    assert from_json(to_json(manifest), manifest.id) == manifest


def test_another_models_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    other = _build(write_model(tmp_path / "other", seed=1))
    with pytest.raises(WireError, match="expected the manifest of model"):
        from_json(to_json(_build(folder)), other.id)


_FILE, _TENSOR = 1, 2  # places in the document
_NAME, _SIZE, _SHA, _HEADER, _HEADER_SHA = range(5)
_T_NAME, _T_DTYPE, _T_SHAPE, _T_FILE, _T_BEGIN, _T_END, _T_SHA = range(7)


def _set(*path: int, to: object) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = to

    return change


def _copy_first(kind: int) -> Callable[[Any], None]:
    return lambda document: document[kind].append(document[kind][0])


def _shift(tensor: int, by: int) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        document[_TENSOR][tensor][_T_BEGIN] += by
        document[_TENSOR][tensor][_T_END] += by

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_set(_FILE, 0, _NAME, to="../config.json"), "plain file name"),
        (_set(_FILE, 0, _NAME, to="/etc/passwd"), "plain file name"),
        (_set(_FILE, 0, _NAME, to=".."), "plain file name"),
        (_set(_FILE, 0, _NAME, to="a\\b"), "plain file name"),
        (_set(_FILE, 0, _NAME, to="a\0b"), "plain file name"),
        (_set(_FILE, 0, _NAME, to=""), "plain file name"),
        (_set(_FILE, 0, _NAME, to="TOKENIZER.json"), "names a file twice"),
        (_set(_FILE, 0, _SIZE, to=-1), "expected an integer"),
        (_set(_FILE, 0, _SIZE, to=True), "expected an integer"),
        (_set(_FILE, 0, _SIZE, to=1 << 60), "expected an integer"),
        (_set(_FILE, 0, _SHA, to="0" * 63), "expected a SHA-256"),
        (_set(_FILE, 2, _HEADER, to=1 << 40), "expected an integer"),
        (_set(_FILE, 2, _HEADER_SHA, to=""), "no valid hash"),
        (_set(_FILE, 0, to={}), "expected an array"),
        (_copy_first(_FILE), "names a file twice"),
        (_copy_first(_TENSOR), "names a tensor twice"),
        (_shift(0, by=-4), "not tensor data"),
        (_shift(1, by=-4), "overlaps"),
        (_shift(-1, by=4), "not tensor data"),
        (_set(_TENSOR, 0, _T_SHAPE, to=[7]), "claims 4096 bytes"),
        (_set(_TENSOR, 0, _T_SHAPE, to=[-1024]), "expected an integer"),
        (_set(_TENSOR, 0, _T_DTYPE, to="F33"), "unknown element type"),
        (_set(_TENSOR, 0, _T_FILE, to=99), "expected an integer"),
        (_set(_TENSOR, 0, _T_FILE, to=0), "not tensor data"),
        (_set(_TENSOR, 0, _T_SHA, to="A" * 64), "expected a SHA-256"),
        (_set(_TENSOR, 0, _T_NAME, to="x" * 9999), "at most 512 characters"),
        (_set(0, to=2), "expected an integer"),
    ],
)
def test_a_lying_manifest_is_refused(folder: Path, change: Callable[[Any], None], complaint: str) -> None:
    manifest = _build(folder)
    document = json.loads(to_json(manifest))
    change(document)
    with pytest.raises(WireError, match=complaint):
        from_json(json.dumps(document).encode(), manifest.id)


@pytest.mark.parametrize("data", [b"", b"\xff", b"{}", b"[" * 100_000, b"[1,[", b"[1" + b"0" * 5000 + b"]"])
def test_what_is_no_manifest_at_all_is_refused(folder: Path, data: bytes) -> None:
    with pytest.raises(WireError, match="manifest"):
        from_json(data, _build(folder).id)


def test_a_giant_manifest_is_refused_before_it_is_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = _build(folder)
    monkeypatch.setattr("cluster.models.manifest.MANIFEST_BYTES_MAX", 100)
    with pytest.raises(WireError, match="at most 100 are read"):
        from_json(b"[" * 101, manifest.id)


def test_where_a_model_came_from_travels_but_is_no_part_of_its_id(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "conversions.json").write_text('{"conversions": ["unpacked", "packed"]}')
    checkpoint = open_checkpoint(folder)
    one = build_manifest(checkpoint, name="a", revision="1", source="here")
    two = build_manifest(checkpoint, name="b", revision="2", source="there")
    assert one.id == two.id
    assert from_json(to_json(two), one.id) == two
    assert (two.source, two.licence, two.conversions) == ("there", "mit", ("unpacked", "packed"))
