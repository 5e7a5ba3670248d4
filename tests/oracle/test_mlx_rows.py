"""Matrices that are read by rows: wherever a library puts their rows, and however many are read at once, they hold what
the file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.errors import ModelError
from cluster.models.checkpoint import StoredTensor
from cluster.models.safetensors_header import read_header
from node.engines.mlx import rows
from node.engines.mlx.quantising import Packed
from node.engines.mlx.rows import RowReader
from node.engines.mlx.sources import AsStored, Form, Source

Arrays = dict[str, mx.array]

SHAPES = {"alone.0.weight": (96, 128), "alone.1.weight": (96, 128), "stack.weight": (3, 96, 128)}
TURNED = {"turned.weight": (3, 128, 96)}

MOVES: dict[str, Callable[[Arrays], mx.array]] = {
    "nothing": lambda arrays: arrays["alone.0.weight"],
    "stacked": lambda arrays: mx.stack([arrays["alone.1.weight"], arrays["alone.0.weight"]]),
    "second half": lambda arrays: mx.split(arrays["alone.0.weight"], 2)[1],
    "every other row": lambda arrays: arrays["stack.weight"][:, 1::2],
    "any order": lambda arrays: arrays["alone.0.weight"][mx.array([5, 3, 4, 95, 0, 1])],
    "joined": lambda arrays: mx.concatenate([arrays["alone.1.weight"][7:9], arrays["alone.0.weight"][:5]]),
    "turned": lambda arrays: arrays["turned.weight"].swapaxes(-1, -2),
    "turned, halves": lambda arrays: mx.split(arrays["turned.weight"].swapaxes(-1, -2), 2, axis=-2)[1],
    "turned, every other row": lambda arrays: arrays["turned.weight"].swapaxes(-1, -2)[..., ::2, :],
}


def saved(folder: Path, dtype: mx.Dtype) -> tuple[Arrays, dict[str, StoredTensor]]:
    mx.random.seed(3)
    arrays = {name: mx.random.normal(shape).astype(dtype) for name, shape in (SHAPES | TURNED).items()}
    path = folder / "model.safetensors"
    mx.save_safetensors(str(path), arrays)
    found = read_header(path)
    stored = {
        name: StoredTensor(name, entry.dtype, entry.shape, path.name, entry.begin, entry.end)
        for name, entry in found.items()
    }
    return arrays, stored


def reader(folder: Path, stored: dict[str, StoredTensor], form: Callable[[str], Form]) -> RowReader:
    return RowReader(folder, {name: Source(stored[name], form(name), name in TURNED) for name in stored})


@pytest.mark.parametrize("at_once", [64 * 96, 1000, 1])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("move", MOVES)
def test_rows_go_where_the_library_puts_them(
    move: str, bits: int | None, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_NUMBERS_AT_ONCE", at_once)
    arrays, stored = saved(tmp_path, mx.bfloat16)
    form = AsStored(128, mx.bfloat16) if bits is None else Packed(128, bits, mx.bfloat16)
    by_rows = reader(tmp_path, stored, lambda name: form)
    placed = by_rows.placed({"x.weight": MOVES[move](by_rows.marks())})
    expected = MOVES[move](arrays)
    if bits is None:
        wanted = {"x.weight": expected}
    else:
        names = ("x.weight", "x.scales", "x.biases")
        wanted = dict(zip(names, mx.quantize(expected, group_size=64, bits=bits, stream=mx.cpu), strict=True))
    assert placed.keys() == wanted.keys()
    for name, array in wanted.items():
        assert name in by_rows
        assert (placed[name].shape, placed[name].dtype) == (array.shape, array.dtype)
        assert mx.array_equal(by_rows.read(name), array), name


@pytest.mark.parametrize("at_once", [64 * 96, 1000, 1])
def test_rows_become_columns_where_the_library_turns_them(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does with what expands latents: by heads, of which one part is turned and the other is not."""
    monkeypatch.setattr(rows, "_NUMBERS_AT_ONCE", at_once)
    arrays, stored = saved(tmp_path, mx.bfloat16)

    def parts(given: Arrays) -> Arrays:
        heads = given["alone.0.weight"].reshape(4, 24, -1)
        return {"turned.weight": mx.contiguous(heads[:, :16].swapaxes(-1, -2)), "rest.weight": heads[:, 16:]}

    by_rows = reader(tmp_path, stored, lambda name: AsStored(128, mx.bfloat16))
    placed = by_rows.placed(parts(by_rows.marks()))
    for name, array in parts(arrays).items():
        assert placed[name].shape == array.shape
        assert mx.array_equal(by_rows.read(name), array), name


def test_a_stack_of_several_types_is_refused(tmp_path: Path) -> None:
    _, stored = saved(tmp_path, mx.bfloat16)
    types = {"alone.0.weight": mx.bfloat16, "alone.1.weight": mx.float32}
    by_rows = reader(tmp_path, stored, lambda name: AsStored(128, types.get(name, mx.bfloat16)))
    marks = by_rows.marks()
    with pytest.raises(ModelError, match="several types"):
        by_rows.placed({"x.weight": mx.stack([marks["alone.0.weight"], marks["alone.1.weight"]])})


@pytest.mark.parametrize("damage", ["short", "gone"])
def test_a_file_that_ends_early_is_refused(damage: str, tmp_path: Path) -> None:
    _, stored = saved(tmp_path, mx.bfloat16)
    by_rows = reader(tmp_path, stored, lambda name: AsStored(128, mx.bfloat16))
    placed = by_rows.placed({"x.weight": by_rows.marks()["stack.weight"]})
    path = tmp_path / "model.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(stored["stack.weight"].end - 1)
    with pytest.raises(ModelError, match=r"ends within|cannot be read"):
        by_rows.read(next(iter(placed)))
