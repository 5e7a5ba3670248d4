"""What the hub announces of files, and whether bytes are that."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling

from cluster.errors import ModelError
from cluster.models.manifest import FileEntry
from coordinator.hub_hashes import HubFile, check_names, has_digest

_DATA = b'{"model_type": "llama"}'
_SHA256 = hashlib.sha256(_DATA).hexdigest()
_GIT_ID = "3a7cf2f3a7f4bcd1f6e8a7f4b8b4b2d6c0b6f1c5"


def test_a_small_file_is_called_as_git_calls_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(_DATA)
    told = subprocess.run(["git", "hash-object", str(path)], capture_output=True, text=True, check=True).stdout.strip()
    assert has_digest(path, told)
    path.write_bytes(_DATA.replace(b"llama", b"lmama"))
    assert not has_digest(path, told)


def test_a_large_file_is_called_by_its_content_and_not_by_the_pointer_to_it(tmp_path: Path) -> None:
    sibling = RepoSibling("tokenizer.json", None, _GIT_ID, BlobLfsInfo(len(_DATA), _SHA256, 134))
    file = HubFile.of(sibling)
    assert (file.digest, file.size_bytes) == (_SHA256, len(_DATA))
    (tmp_path / "tokenizer.json").write_bytes(_DATA)
    assert has_digest(tmp_path / "tokenizer.json", file.digest)


@pytest.mark.parametrize("blob_id", [None, "", "W/abc", "A" * 40, "0" * 32, "0" * 39])
def test_what_is_no_hash_of_the_hubs_is_none(blob_id: str | None) -> None:
    assert HubFile.of(RepoSibling("config.json", 7, blob_id)).digest == ""


def test_some_mirrors_call_small_files_by_their_plain_sha1(tmp_path: Path) -> None:
    blob = tmp_path / hashlib.sha1(_DATA).hexdigest()
    blob.write_bytes(_DATA)
    assert has_digest(blob, blob.name)
    blob.write_bytes(_DATA + b" ")
    assert not has_digest(blob, blob.name)


def test_a_cached_weight_file_that_is_not_what_it_is_called_is_refused(tmp_path: Path) -> None:
    """Other programs put files there too, and need not look at what they got."""
    blob = tmp_path / "blobs" / _SHA256
    blob.parent.mkdir()
    blob.write_bytes(_DATA)
    (tmp_path / "model.safetensors").symlink_to(blob)
    (tmp_path / "config.json").write_bytes(_DATA)
    check_names(tmp_path, [_entry("model.safetensors", _SHA256), _entry("config.json", "1" * 64)])
    with pytest.raises(ModelError, match=rf"not the file that was published: remove {blob}"):
        check_names(tmp_path, [_entry("model.safetensors", "1" * 64)])


def _entry(name: str, sha256: str) -> FileEntry:
    return FileEntry(name, len(_DATA), sha256, 0, "")
