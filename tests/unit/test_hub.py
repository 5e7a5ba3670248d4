"""What MODEL means is decided without the network; only a hub id may reach it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from coordinator.hub import GgufModel, HubGguf, HubModel, find_model, parse_model, peek_model, resolve_model, work_on
from coordinator.text.model import load_text_model
from tests.gguf_paper import paper_gguf


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    resolved = resolve_model("models/mine", conversions=tmp_path)
    assert (resolved.folder, resolved.name, resolved.revision) == (tmp_path / "models" / "mine", "mine", "local")


@pytest.mark.parametrize("text", ["models/mine", "models/paper.gguf", "models/ggufs", "demo"])
def test_what_was_found_can_be_named_from_any_other_folder(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("models/mine").mkdir(parents=True)
    paper_gguf(tmp_path / "models" / "paper.gguf")
    paper_gguf(tmp_path / "models" / "ggufs" / "other.gguf")
    found = resolve_model(text, conversions=tmp_path / "made")
    monkeypatch.chdir("models")
    assert resolve_model(found.text, conversions=tmp_path / "made") == found


def test_a_folder_named_by_a_dot_has_its_real_name(tmp_path: Path) -> None:
    assert resolve_model(".", conversions=Path()).name == tmp_path.name


def test_demo_is_the_built_in_model() -> None:
    resolved = resolve_model("demo", conversions=Path())
    assert resolved.name == "demo"
    assert resolved.folder.parent.name == "builtin"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("org/name", HubModel("org/name", None)),
        ("Org-1/Model.v2_x@main", HubModel("Org-1/Model.v2_x", "main")),
        ("org/name@refs/pr/3", HubModel("org/name", "refs/pr/3")),
        ("org/name@" + "0" * 40, HubModel("org/name", "0" * 40)),
        ("org/name-GGUF/name.Q4_K_M.gguf", HubGguf("org/name-GGUF", "name.Q4_K_M.gguf", None)),
        ("org/name/x-00001-of-00002.gguf@v1", HubGguf("org/name", "x-00001-of-00002.gguf", "v1")),
    ],
)
def test_a_hub_id_may_name_a_revision(text: str, meant: HubModel) -> None:
    assert parse_model(text) == meant


@pytest.mark.parametrize(
    "text",
    [
        "./models/mine", "../mine", "/models/mine", "~/models/mine", "models/mine/", "a/b/c", "models\\mine",
        "mine", "", "org/", "/name", "org/name@", "org/name.gguf", "org/model.safetensors", "org/na me", "örg/name",
        "org/-name", "org/name@a b", "./org/name/x.gguf", "a/b/c/x.gguf", "org/x.gguf", "x.gguf",
    ],
)  # fmt: skip
def test_what_looks_like_a_path_is_a_missing_folder(text: str) -> None:
    with pytest.raises(ModelError, match="no folder"):
        parse_model(text)


def test_a_typing_error_beside_real_folders_is_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no folder .*models/lama"):
        parse_model("models/lama")


def test_a_typing_error_in_a_file_beside_real_folders_is_one_too(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError, match=r"no folder .*lama/x\.gguf"):
        parse_model("models/lama/x.gguf")


def test_a_missing_folder_never_reaches_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coordinator.hub_download", None)  # importing it would fail
    with pytest.raises(ModelError, match="no folder"):
        resolve_model("./org/name", conversions=Path())
    with pytest.raises(ImportError):
        resolve_model("org/name", conversions=Path())


def test_a_bare_word_is_told_what_hub_ids_look_like() -> None:
    with pytest.raises(ModelError, match="org/name"):
        parse_model("llama")


def test_a_file_is_told_to_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file"):
        parse_model("model.safetensors")


def test_a_gguf_file_is_a_model_and_so_is_a_folder_of_one(tmp_path: Path) -> None:
    path = paper_gguf(tmp_path / "models" / "paper.gguf")
    assert parse_model("models/paper.gguf") == parse_model("models") == GgufModel(path)
    (tmp_path / "models" / "model.safetensors").touch()
    assert parse_model("models") == tmp_path / "models"


def test_a_gguf_file_becomes_a_folder_below_the_conversions(tmp_path: Path) -> None:
    path = paper_gguf(tmp_path / "paper.Q4_K.gguf")
    assert find_model(str(path), conversions=tmp_path / "made") is None
    resolved = resolve_model(str(path), conversions=tmp_path / "made")
    assert resolved.folder.parent == tmp_path / "made"
    assert (resolved.name, resolved.revision, resolved.source) == ("paper.Q4_K", "local", str(path))
    assert find_model(str(path), conversions=tmp_path / "made") == resolved
    assert load_text_model(resolved.folder).eos_ids == {2}


def test_a_gguf_file_is_peeked_at_without_being_converted(tmp_path: Path) -> None:
    path = paper_gguf(tmp_path / "paper.gguf")
    facts = read_facts(peek_model(str(path)))
    assert sorted(tmp_path.iterdir()) == [path]
    assert facts == read_facts(open_checkpoint(resolve_model(str(path), conversions=tmp_path / "made").folder))


def test_progress_says_what_finding_a_model_takes(tmp_path: Path) -> None:
    path = paper_gguf(tmp_path / "paper.gguf")
    assert work_on(str(path)) == "converting paper.gguf"
    assert work_on("org/name") == "downloading org/name"


# -- Which weights count ---------------------------------------------------------------------------------


def _weights_of(folder: Path, *names: str) -> list[str]:
    from coordinator.hub_download import weights_of

    return weights_of(set(names), folder)


def test_weights_beside_the_index_are_not_downloaded(tmp_path: Path) -> None:
    """Some repositories hold everything a second time as consolidated.safetensors."""
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    names = ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors", "model.safetensors.index.json")
    assert _weights_of(tmp_path, *names) == ["model-1.safetensors", "model-2.safetensors"]


def test_a_single_file_counts_alone(tmp_path: Path) -> None:
    assert _weights_of(tmp_path, "model.safetensors", "consolidated.safetensors") == ["model.safetensors"]


def test_without_an_index_every_file_counts(tmp_path: Path) -> None:
    assert _weights_of(tmp_path, "b.safetensors", "a.safetensors", "config.json") == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("weight_map", [{"a": "gone.safetensors"}, {}, None, {"a": 7}, {"a": ["b"]}])
def test_an_index_that_lists_what_is_not_there_is_refused(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="not there"):
        _weights_of(tmp_path, "model.safetensors.index.json", "other.safetensors")
