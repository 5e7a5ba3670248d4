"""A conversion writes the right bytes in bounded memory, and leaves whole files or none."""

from __future__ import annotations

import json
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.errors import ModelError
from cluster.models.card import read_conversions, read_licence
from cluster.models.checkpoint import Checkpoint, open_checkpoint
from coordinator.gguf import convert as module
from coordinator.gguf.convert import convert
from coordinator.gguf.layout import Layout, lay_out
from coordinator.gguf.source import open_gguf
from coordinator.gguf.store import ConversionStore
from tests.gguf_blocks import Floats, dequantised, stored
from tests.gguf_files import Stored
from tests.gguf_paper import HEAD_DIM, HEADS, paper_gguf, paper_tensors

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def layout_of(path: Path, tensors: dict[str, Stored] | None = None, shard_bytes: int = 1 << 30) -> Layout:
    return lay_out(open_gguf(paper_gguf(path, None, tensors)), shard_bytes=shard_bytes)


def read(checkpoint: Checkpoint, name: str) -> Array:
    """A tensor of 16-bit floats, or an unpacked matrix of any bits."""
    stem = name.removesuffix(".weight")
    if f"{stem}.scales" not in checkpoint.tensors:
        return raw(checkpoint, name, "<f2").astype(np.float32)
    words, scales, biases = (
        raw(checkpoint, name, "<u4"),
        *(raw(checkpoint, f"{stem}.{p}", "<f2") for p in ("scales", "biases")),
    )
    bits = words.shape[1] * 32 // (scales.shape[1] * 32)
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").reshape(words.shape[0], -1, bits)
    codes = (stream.astype(np.int64) << np.arange(bits)).sum(axis=2)
    return (scales.astype(np.float64).repeat(32, 1) * codes + biases.astype(np.float64).repeat(32, 1)).astype(
        np.float32
    )


def raw(checkpoint: Checkpoint, name: str, dtype: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
    tensor = checkpoint.tensors[name]
    data = (checkpoint.folder / tensor.file).read_bytes()[tensor.begin : tensor.end]
    return np.frombuffer(data, dtype).reshape(tensor.shape)


def in_order(values: Floats, heads: int) -> Floats:
    """Row by row: the even rows of a head, then the odd ones."""
    rows = []
    for head in np.split(values, heads):
        rows += [*head[0::2], *head[1::2]]
    return np.stack(rows)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_value_is_the_files_but_for_one_rounding_of_scales_and_biases(tmp_path: Path) -> None:
    tensors = paper_tensors()
    convert(layout_of(tmp_path / "x.gguf", tensors), {}, tmp_path / "made")
    made = open_checkpoint(tmp_path / "made")
    values = dequantised(tensors["blk.1.ffn_up.weight"])
    # Half a step of float16 for the product and for the minimum, each of which may be wider than the value.
    np.testing.assert_allclose(
        read(made, "model.layers.1.mlp.up_proj.weight"), values, atol=2**-11 * 2 * np.abs(values).max()
    )
    exact = dequantised(tensors["blk.0.ffn_down.weight"])
    np.testing.assert_array_equal(read(made, "model.layers.0.mlp.down_proj.weight"), exact)
    norm = dequantised(tensors["output_norm.weight"]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(read(made, "model.norm.weight"), norm)


def test_rows_of_queries_and_keys_are_put_in_order_and_no_others(tmp_path: Path) -> None:
    tensors = paper_tensors("Q8_0")
    convert(layout_of(tmp_path / "x.gguf", tensors), {}, tmp_path / "made")
    made = open_checkpoint(tmp_path / "made")
    queries = dequantised(tensors["blk.0.attn_q.weight"])
    assert queries.shape[0] == HEADS * HEAD_DIM
    np.testing.assert_array_equal(read(made, "model.layers.0.self_attn.q_proj.weight"), in_order(queries, HEADS))
    values = dequantised(tensors["blk.0.attn_v.weight"])
    np.testing.assert_array_equal(read(made, "model.layers.0.self_attn.v_proj.weight"), values)


def test_some_rows_at_a_time_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(layout_of(tmp_path / "x.gguf"), {}, tmp_path / "whole")
    monkeypatch.setattr(module, "_CHUNK_VALUES", 256 * 3)
    convert(layout_of(tmp_path / "x.gguf"), {}, tmp_path / "pieces")
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "pieces")


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = ("Q8_0", (4096, 256), bytes(34 * 4096 * 8))
    layout = layout_of(tmp_path / "x.gguf", paper_tensors("Q8_0") | {"token_embd.weight": wide})
    monkeypatch.setattr(module, "_CHUNK_VALUES", 256 * 64)
    tracemalloc.start()
    convert(layout, {}, tmp_path / "made")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4096 * 256 / 2


def test_what_a_kill_leaves_is_used_and_the_result_is_the_same(tmp_path: Path) -> None:
    layout = layout_of(tmp_path / "x.gguf", shard_bytes=20_000)
    assert len(layout.shards) > 3
    convert(layout, {}, tmp_path / "straight")
    stop, told = threading.Event(), []

    def on_progress(done: int, total: int) -> None:
        told.append((done, total))
        if done > total / 2:
            stop.set()

    with pytest.raises(ModelError, match="cancelled"):
        convert(layout, {}, tmp_path / "made", on_progress, stop)
    assert not (tmp_path / "made").exists()
    whole = [path for path in (tmp_path / "made.part").glob("*.safetensors") if path.name[0] != "."]
    assert 0 < len(whole) < len(layout.shards)
    before = {path.name: path.stat().st_mtime_ns for path in whole}
    told.clear()
    convert(layout, {}, tmp_path / "made", lambda done, total: told.append((done, total)))
    assert {name: (tmp_path / "made" / name).stat().st_mtime_ns for name in before} == before
    assert told[0][0] > 0
    assert told[-1] == (layout.size_bytes, layout.size_bytes)
    assert files_of(tmp_path / "made") == files_of(tmp_path / "straight")


def test_what_another_plan_left_is_written_again(tmp_path: Path) -> None:
    layout = layout_of(tmp_path / "x.gguf")
    shard = layout.shards[0]
    (tmp_path / "made.part").mkdir()
    (tmp_path / "made.part" / shard.name).write_bytes(bytes(shard.size_bytes))
    convert(layout, {}, tmp_path / "made")
    assert open_checkpoint(tmp_path / "made").tensors.keys() == layout.checkpoint().tensors.keys()


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"needs .* on the disk of .* 1000 B free"):
        convert(layout_of(tmp_path / "x.gguf"), {}, tmp_path / "made")
    assert not list((tmp_path / "made.part").iterdir())


@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_values_beyond_the_type_are_refused(value: float, tmp_path: Path) -> None:
    norm = stored(np.array([value] * 256, np.float32), "F32")
    layout = layout_of(tmp_path / "x.gguf", paper_tensors() | {"output_norm.weight": norm})
    with pytest.raises(ModelError, match=r"output_norm\.weight holds values that F16 cannot"):
        convert(layout, {}, tmp_path / "made")


def test_a_scale_beyond_the_type_is_refused(tmp_path: Path) -> None:
    kind, shape, data = paper_tensors()["blk.0.ffn_up.weight"]
    huge = (kind, shape, np.float16(60_000).tobytes() + data[2:])
    layout = layout_of(tmp_path / "x.gguf", paper_tensors() | {"blk.0.ffn_up.weight": huge})
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight holds values that F16 cannot"):
        convert(layout, {}, tmp_path / "made")


# -- Which file became which folder ----------------------------------------------------------------------


def test_a_file_is_converted_once_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ConversionStore(tmp_path / "converted")
    path = paper_gguf(tmp_path / "paper.gguf")
    assert store.find(path) is None
    made = store.make(path)
    monkeypatch.setattr("coordinator.gguf.store.convert", None)  # calling it would fail
    moved = tmp_path / "elsewhere" / "paper.gguf"
    moved.parent.mkdir()
    path.rename(moved)
    moved.touch()
    assert store.make(moved) == store.find(moved) == made


def test_another_content_is_another_model(tmp_path: Path) -> None:
    store = ConversionStore(tmp_path / "converted")
    first = store.make(paper_gguf(tmp_path / "paper.gguf"))
    second = store.make(paper_gguf(tmp_path / "paper.gguf", None, paper_tensors(seed=1)))
    assert first != second
    assert files_of(first)["model-00001-of-00001.safetensors"] != files_of(second)["model-00001-of-00001.safetensors"]


def test_progress_counts_what_is_read_and_written(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    path = paper_gguf(tmp_path / "paper.gguf")
    made = ConversionStore(tmp_path / "converted").make(path, lambda done, total: told.append((done, total)))
    written = (made / "model-00001-of-00001.safetensors").stat().st_size
    assert told == sorted(told)
    assert told[-1] == (path.stat().st_size + written,) * 2


def test_a_model_that_no_engine_runs_is_refused_before_it_is_written(tmp_path: Path) -> None:
    path = paper_gguf(tmp_path / "paper.gguf", {"llama.block_count": 3})
    with pytest.raises(ModelError, match="gives 3 layers, but the files hold 2"):
        ConversionStore(tmp_path / "converted").make(path)
    assert not (tmp_path / "converted").exists()


def test_two_conversions_at_once_are_not_made(tmp_path: Path) -> None:
    store = ConversionStore(tmp_path / "converted")
    with store.shelf.alone(), pytest.raises(ModelError, match="another Potluck process"):
        store.make(paper_gguf(tmp_path / "paper.gguf"))


def test_the_folder_tells_where_it_came_from(tmp_path: Path) -> None:
    made = ConversionStore(tmp_path / "converted").make(paper_gguf(tmp_path / "paper.gguf"))
    assert read_licence(made) == "mit"
    lines = read_conversions(made)
    assert lines[0].startswith("converted from GGUF by Potluck")
    assert lines[1].startswith("SHA-256 ")
    assert lines[1].endswith(": paper.gguf")
    assert [line.partition(":")[0] for line in lines[2:]] == ["F32", "Q4_K", "Q8_0"]


def test_rubbish_as_a_record_of_conversions_is_none(tmp_path: Path) -> None:
    for rubbish in ("[", "[]", '{"conversions": 3}', json.dumps({"conversions": [1]})):
        (tmp_path / "conversions.json").write_text(rubbish)
        assert read_conversions(tmp_path) == ()
