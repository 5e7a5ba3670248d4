"""coordinator/text/model.py: what a model's folder says about text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import ModelError
from coordinator.text.model import SamplingDefaults, load_text_model
from tests.tiny_tokenizers import END, byte_level

EOS = byte_level().token_to_id(END)


def folder(path: Path, **files: object) -> Path:
    """A folder with a tokenizer and JSON files; the names' underscores before json and jinja are dots."""
    byte_level().save(str(path / "tokenizer.json"))
    for name, value in files.items():
        stem, _, extension = name.rpartition("_")
        text = value if isinstance(value, str) else json.dumps(value)
        (path / f"{stem}.{extension}").write_text(text, encoding="utf-8")
    return path


def test_a_folder_with_a_tokenizer_alone_is_enough(tmp_path: Path) -> None:
    text = load_text_model(folder(tmp_path))
    assert text.template is None
    assert text.eos_ids == frozenset()
    assert text.defaults == SamplingDefaults()


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json.*save_pretrained"):
        load_text_model(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        load_text_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_damaged_settings_are_named(tmp_path: Path, content: str) -> None:
    folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        load_text_model(tmp_path)


def rendered(path: Path) -> str:
    template = load_text_model(path).template
    assert template is not None
    return template.render([{"role": "user", "content": "hi"}])


def test_a_template_of_its_own_file_wins(tmp_path: Path) -> None:
    files = {"chat_template_jinja": "A", "tokenizer_config_json": {"chat_template": "B"}}
    assert rendered(folder(tmp_path, **files, chat_template_json={"chat_template": "C"})) == "A"


def test_the_template_in_the_settings(tmp_path: Path) -> None:
    settings = {"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": "<s>", "eos_token": {"content": END}}
    assert rendered(folder(tmp_path, tokenizer_config_json=settings)) == f"<s>{END}"


def test_of_several_templates_the_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert rendered(folder(tmp_path, tokenizer_config_json={"chat_template": named})) == "D"


def test_the_template_of_older_multimodal_models(tmp_path: Path) -> None:
    assert rendered(folder(tmp_path, chat_template_json={"chat_template": "C"})) == "C"


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="chat template"):
        load_text_model(folder(tmp_path, tokenizer_config_json={"chat_template": 3}))


def test_end_of_sequence_from_the_generation_settings_first(tmp_path: Path) -> None:
    path = folder(tmp_path, generation_config_json={"eos_token_id": [5, 6]}, config_json={"eos_token_id": 7})
    assert load_text_model(path).eos_ids == {5, 6}


def test_end_of_sequence_from_the_configuration_and_its_text_part(tmp_path: Path) -> None:
    assert load_text_model(folder(tmp_path, config_json={"eos_token_id": 7})).eos_ids == {7}
    nested = {"eos_token_id": None, "text_config": {"eos_token_id": 8}}
    assert load_text_model(folder(tmp_path, config_json=nested)).eos_ids == {8}


def test_the_tokenizers_own_end_of_sequence_counts_as_well(tmp_path: Path) -> None:
    path = folder(tmp_path, config_json={"eos_token_id": 7}, tokenizer_config_json={"eos_token": END})
    assert load_text_model(path).eos_ids == {7, EOS}


@pytest.mark.parametrize("ids", ["x", [True], False, -1, [7, 1.0], [1 << 40], [[7]], float("inf"), {"id": 7}], ids=repr)
def test_a_senseless_end_of_sequence_is_refused(tmp_path: Path, ids: object) -> None:
    with pytest.raises(ModelError, match="eos_token_id"):
        load_text_model(folder(tmp_path, config_json={"eos_token_id": ids}))


def test_recommended_sampling_is_read(tmp_path: Path) -> None:
    recommended = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True}
    expected = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)
    assert load_text_model(folder(tmp_path, generation_config_json=recommended)).defaults == expected


def test_a_model_that_asks_not_to_be_sampled_is_greedy_by_default(tmp_path: Path) -> None:
    recommended = {"temperature": 0.6, "do_sample": False}
    assert load_text_model(folder(tmp_path, generation_config_json=recommended)).defaults.temperature == 0.0


def test_whole_numbers_may_be_written_in_either_way_and_minus_one_is_off(tmp_path: Path) -> None:
    recommended = {"temperature": 1, "top_k": 20.0}
    expected = SamplingDefaults(temperature=1.0, top_k=20)
    assert load_text_model(folder(tmp_path, generation_config_json=recommended)).defaults == expected
    assert load_text_model(folder(tmp_path, generation_config_json={"top_k": -1})).defaults.top_k == 0


_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@pytest.mark.parametrize(
    ("name", "written"),
    [
        *((name, text) for name in _NUMBERS for text in ("Infinity", "-Infinity", "NaN", "1e999", "1" + "0" * 400)),
        *((name, text) for name in _NUMBERS for text in ("true", '"hot"', "[1]", "{}")),
        ("temperature", "-1"),
        ("top_k", "20.5"),
        ("top_k", "1e15"),
        ("top_p", "1.5"),
        ("repetition_penalty", "1e9"),
        ("do_sample", '"no"'),
        ("do_sample", "0"),
    ],
)
def test_senseless_recommendations_are_refused(tmp_path: Path, name: str, written: str) -> None:
    with pytest.raises(ModelError, match="generation_config"):
        load_text_model(folder(tmp_path, generation_config_json=f'{{"{name}": {written}}}'))


def test_special_tokens_are_added_to_plain_texts_only_when_asked(tmp_path: Path) -> None:
    from tests.tiny_tokenizers import byte_fallback

    byte_fallback().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_text_model(tmp_path).tokenizer
    assert tokenizer.encode("a", add_special_tokens=True)[0] == 1
    assert 1 not in tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("</s>", add_special_tokens=False) == (2,)
