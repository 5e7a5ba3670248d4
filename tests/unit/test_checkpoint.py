"""Which files of a folder count, and that each fault is refused with a message that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import ModelError
from cluster.limits import CONFIG_BYTES_MAX
from cluster.models.checkpoint import open_checkpoint
from cluster.types import DType
from tests.safetensors_files import write_safetensors

A, B = {"a": (DType.F32, (2,))}, {"b": (DType.F16, (3,))}


def folder_with(folder: Path, *, config: str = "{}", index: object = None, **files: dict[str, object]) -> Path:
    (folder / "config.json").write_text(config)
    for name, tensors in files.items():
        write_safetensors(folder / f"{name}.safetensors", tensors)  # type: ignore[arg-type]
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def test_a_single_file_wins_over_others(tmp_path: Path) -> None:
    found = open_checkpoint(folder_with(tmp_path, model=A, adapter=B))
    assert (set(found.tensors), found.files) == ({"a"}, ("model.safetensors",))


def test_an_index_names_the_files(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    found = open_checkpoint(folder_with(tmp_path, index=index, **{"m-1": A, "m-2": B, "other": A}))
    assert found.files == ("m-1.safetensors", "m-2.safetensors")
    assert (found.tensors["b"].file, found.tensors["b"].size_bytes) == ("m-2.safetensors", 6)


def test_without_an_index_all_files_count(tmp_path: Path) -> None:
    assert set(open_checkpoint(folder_with(tmp_path, one=A, two=B)).tensors) == {"a", "b"}


def test_the_configuration_comes_along(tmp_path: Path) -> None:
    assert open_checkpoint(folder_with(tmp_path, config='{"model_type": "llama"}', model=A)).config == {
        "model_type": "llama"
    }


def test_names_every_missing_file(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-3.safetensors"}}
    assert "lists m-1.safetensors, m-3.safetensors, not found" in refusal(
        folder_with(tmp_path, index=index, **{"m-2": B})
    )


def test_refuses_an_index_that_promises_what_a_file_lacks(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "m-1.safetensors", "z": "m-1.safetensors"}}
    assert "m-1.safetensors holds 'z', but it does not" in refusal(folder_with(tmp_path, index=index, **{"m-1": A}))


def test_refuses_an_index_that_names_the_wrong_file(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors"}}
    files = {"m-1": A, "m-2": B}
    assert "m-2.safetensors holds 'a', but it does not" in refusal(folder_with(tmp_path, index=index, **files))


@pytest.mark.parametrize(
    "file",
    ["../m.safetensors", "/etc/m.safetensors", "a\\m.safetensors", ".safetensors", "c:m.safetensors", "m.bin", 3],
)
def test_refuses_an_index_that_leads_out_of_the_folder(tmp_path: Path, file: object) -> None:
    assert "expected a .safetensors file in this folder" in refusal(
        folder_with(tmp_path, index={"weight_map": {"a": file}})
    )


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_refuses_an_index_without_a_map(tmp_path: Path, index: object) -> None:
    assert "expected weight_map" in refusal(folder_with(tmp_path, index=index))


def test_refuses_a_tensor_in_two_files(tmp_path: Path) -> None:
    assert "both one.safetensors and two.safetensors hold 'a'" in refusal(folder_with(tmp_path, one=A, two=A))


def test_says_that_only_safetensors_are_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "Potluck reads safetensors, and GGUF files by name" in refusal(folder_with(tmp_path))


def test_says_when_there_are_no_weights(tmp_path: Path) -> None:
    assert "found no weights" in refusal(folder_with(tmp_path))
    assert "found none; download" in refusal(folder_with(tmp_path, model={}))


def test_says_when_there_is_no_model(tmp_path: Path) -> None:
    assert "expected config.json" in refusal(tmp_path)
    assert "expected a model's folder, found nothing" in refusal(tmp_path / "absent")
    (tmp_path / "file").touch()
    assert "expected a model's folder, found a file" in refusal(tmp_path / "file")


@pytest.mark.parametrize("config", ["[]", "{", '{"a": 1, "a": 2}', "\0"])
def test_refuses_a_damaged_configuration(tmp_path: Path, config: str) -> None:
    assert "config.json: expected" in refusal(folder_with(tmp_path, config=config, model=A))


def test_refuses_a_configuration_above_the_limit(tmp_path: Path) -> None:
    assert "expected at most 4.0 MiB" in refusal(folder_with(tmp_path, config=" " * (CONFIG_BYTES_MAX + 1), model=A))
