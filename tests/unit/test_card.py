"""A model's licence, as its own files name it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.models.card import is_card_file, read_licence


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: 'gemma terms'\n---\n", "gemma terms"),
        ("---\nlicense: other\n---\n", "other"),
        ("# Model\nlicense: mit\n", ""),
        ("---\ntags:\n- a\n---\nlicense: mit\n", ""),
        ("---\nlicense: \x1b[31mred\n---\n", "[31mred"),
        ("", ""),
    ],
)
def test_the_cards_front_matter_names_the_licence(tmp_path: Path, card: str, licence: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path) == licence


def test_without_a_card_the_licence_files_first_line_stands(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("\n\n   MIT License\n\nCopyright")
    assert read_licence(tmp_path) == "MIT License"


def test_a_folder_without_either_or_of_rubbish_has_none(tmp_path: Path) -> None:
    assert read_licence(tmp_path / "nowhere") == ""
    (tmp_path / "README.md").write_bytes(b"---\nlicense\xff\xfe: \x00\n")
    assert read_licence(tmp_path) == ""


def test_only_the_card_and_licences_are_card_files() -> None:
    names = ["README.md", "LICENSE", "LICENCE.md", "COPYING", "license-gemma.txt", "licenser.py", "readme.txt"]
    assert [is_card_file(name) for name in names] == [True] * 5 + [False] * 2
