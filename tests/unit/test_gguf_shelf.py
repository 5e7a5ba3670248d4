"""What was made of GGUF files keeps to a limit: what was used longest ago goes first, what is in use not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ModelError
from coordinator.gguf import shelf
from coordinator.gguf.convert import MARGIN_BYTES
from coordinator.gguf.shelf import ConversionShelf
from coordinator.gguf.store import ConversionStore
from tests.gguf_paper import paper_gguf, paper_tensors

KIB = 1024


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    while shelf._in_use:
        os.close(shelf._in_use.popitem()[1])


def on(root: Path, name: str, used_s: int, size_bytes: int = 4 * KIB, ending: str = "") -> Path:
    """A conversion that was used at a time."""
    folder = root / f"{name}-{'0' * 16}{ending}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(size_bytes))
    (folder / "used").touch()
    os.utime(folder / "used", (used_s, used_s))
    return folder


def names(root: Path) -> list[str]:
    return [conversion.name for conversion in ConversionShelf(root).everything()]


def test_what_takes_disk_is_listed_and_can_be_removed(tmp_path: Path) -> None:
    store = ConversionStore(tmp_path / "converted")
    assert store.shelf.everything() == ()
    made = store.make(paper_gguf(tmp_path / "paper-v1.gguf"))
    (tmp_path / "converted" / f"other-{'0' * 16}.part").mkdir()
    other, whole = store.shelf.everything()
    assert (whole.folder, whole.name, whole.is_whole) == (made, "paper-v1", True)
    assert whole.size_bytes == sum(path.stat().st_size for path in made.iterdir())
    assert (other.name, other.is_whole) == ("other", False)
    assert store.shelf.remove(whole)
    assert [conversion.name for conversion in store.shelf.everything()] == ["other"]
    assert not made.exists()


def test_the_one_used_longest_ago_makes_room_and_no_more_than_needed(tmp_path: Path) -> None:
    for name, used_s in (("first", 300), ("oldest", 100), ("second", 200)):
        on(tmp_path, name, used_s)
    on(tmp_path, "unfinished", 50, ending=".part")
    ConversionShelf(tmp_path, 16 * KIB).make_room(tmp_path / "new", 8 * KIB)
    assert names(tmp_path) == ["first", "second"]


def test_nothing_goes_while_there_is_room(tmp_path: Path) -> None:
    on(tmp_path, "old", 100)
    ConversionShelf(tmp_path, 12 * KIB).make_room(tmp_path / "new", 8 * KIB)
    assert names(tmp_path) == ["old"]


def test_what_an_earlier_try_left_of_the_same_model_stays(tmp_path: Path) -> None:
    part = on(tmp_path, "new", 100, ending=".part")
    on(tmp_path, "old", 200)
    ConversionShelf(tmp_path, 8 * KIB).make_room(part.with_suffix(""), 8 * KIB)
    assert names(tmp_path) == ["new"]


def leave_free(monkeypatch: pytest.MonkeyPatch, root: Path, free_bytes: int) -> None:
    usage = shelf.shutil.disk_usage(root)._replace(free=free_bytes)
    monkeypatch.setattr(shelf.shutil, "disk_usage", lambda path: usage)


def test_a_full_disk_makes_room_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(tmp_path, "old", 100)
    on(tmp_path, "new", 200)
    leave_free(monkeypatch, tmp_path, MARGIN_BYTES + 4 * KIB)
    ConversionShelf(tmp_path).make_room(tmp_path / "next", 8 * KIB)
    assert names(tmp_path) == ["new"]


def test_nothing_goes_for_a_model_that_does_not_fit_the_disk_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(tmp_path, "old", 100)
    leave_free(monkeypatch, tmp_path, MARGIN_BYTES + 3 * KIB)
    with pytest.raises(ModelError, match=r"needs 8\.0 KiB .* would have 4\.0 KiB more .*--state on a larger disk"):
        ConversionShelf(tmp_path).make_room(tmp_path / "new", 8 * KIB)
    assert names(tmp_path) == ["old"]


def test_nothing_goes_where_what_is_in_use_leaves_too_little_room(tmp_path: Path) -> None:
    on(tmp_path, "idle", 100)
    assert ConversionShelf(tmp_path).use(on(tmp_path, "served", 50))
    with pytest.raises(ModelError, match=r"takes 8\.0 KiB, and 4\.0 KiB in .* are in use"):
        ConversionShelf(tmp_path, 11 * KIB).make_room(tmp_path / "new", 8 * KIB)
    assert names(tmp_path) == ["idle", "served"]


def test_what_an_interrupted_removal_left_is_listed_and_goes_with_the_next_start(tmp_path: Path) -> None:
    store, path = ConversionStore(tmp_path), paper_gguf(tmp_path / "paper.gguf")
    store.make(path)
    on(tmp_path, "old", 100, ending=".gone")
    leftover = store.shelf.everything()[0]
    assert (leftover.name, leftover.is_leftover, leftover.is_whole) == ("old", True, False)
    assert leftover.size_bytes == 4 * KIB
    store.use(path)
    assert names(tmp_path) == ["paper"]


def test_a_model_whose_last_removal_was_interrupted_can_be_removed(tmp_path: Path) -> None:
    on(tmp_path, "old", 100, ending=".gone")
    on(tmp_path, "old", 200)
    whole, leftover = ConversionShelf(tmp_path).everything()
    assert ConversionShelf(tmp_path).remove(whole)
    assert names(tmp_path) == []
    assert ConversionShelf(tmp_path).remove(leftover), "it has gone already"


def test_only_a_lock_that_another_holds_says_that_another_converts(tmp_path: Path) -> None:
    wanted = ConversionShelf(tmp_path)
    with wanted.alone(), pytest.raises(ModelError, match="another Potluck process"), ConversionShelf(tmp_path).alone():
        pass
    with pytest.raises(PermissionError, match="the model's file"), wanted.alone():
        raise PermissionError(errno.EACCES, "the model's file")


def test_a_model_beyond_the_limit_is_refused_and_nothing_goes_for_it(tmp_path: Path) -> None:
    on(tmp_path, "old", 100)
    with pytest.raises(ModelError, match=r"takes 8\.0 KiB, but at most 4\.0 KiB.*--weights-max"):
        ConversionShelf(tmp_path, 4 * KIB).make_room(tmp_path / "new", 8 * KIB)
    assert names(tmp_path) == ["old"]


def test_what_another_process_uses_stays_until_it_ends(tmp_path: Path) -> None:
    folder = on(tmp_path, "served", 100)
    on(tmp_path, "later", 200)
    program = "import sys\nfrom pathlib import Path\nfrom coordinator.gguf.shelf import ConversionShelf\n"
    program += "assert ConversionShelf(Path(sys.argv[1])).use(Path(sys.argv[2]))\nprint('used', flush=True)\ninput()"
    command = [sys.executable, "-c", program, str(tmp_path), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "used\n"
        used = ConversionShelf(tmp_path).everything()[-1]
        assert used.last_used_ns > 200 * 10**9
        ConversionShelf(tmp_path, 12 * KIB).make_room(tmp_path / "new", 8 * KIB)
        assert names(tmp_path) == ["served"]
        with pytest.raises(ModelError, match=r"4\.0 KiB in .* are in use"):
            ConversionShelf(tmp_path, 8 * KIB).make_room(tmp_path / "new", 8 * KIB)
        user.communicate("\n")
    ConversionShelf(tmp_path, 8 * KIB).make_room(tmp_path / "new", 8 * KIB)
    assert names(tmp_path) == []


def test_what_goes_while_it_is_about_to_be_used_is_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = ConversionStore(tmp_path / "converted"), paper_gguf(tmp_path / "paper.gguf")
    tried: list[Path] = []
    use = ConversionShelf.use

    def too_late(self: ConversionShelf, folder: Path) -> bool:
        if not tried:
            assert self.remove(self.everything()[0])
        tried.append(folder)
        return use(self, folder)

    monkeypatch.setattr(ConversionShelf, "use", too_late)
    assert store.use(path).is_dir()
    assert len(tried) == 2


def test_a_conversion_makes_room_for_itself(tmp_path: Path) -> None:
    first = ConversionStore(tmp_path / "converted").make(paper_gguf(tmp_path / "paper.gguf"))
    size_bytes = ConversionShelf(tmp_path / "converted").everything()[0].size_bytes
    store = ConversionStore(tmp_path / "converted", size_bytes * 3 // 2)
    second = store.make(paper_gguf(tmp_path / "paper.gguf", None, paper_tensors(seed=1)))
    assert second.is_dir()
    assert not first.exists()


def test_the_lock_of_a_model_is_shared_by_its_users(tmp_path: Path) -> None:
    folder = on(tmp_path, "served", 100)
    assert ConversionShelf(tmp_path).use(folder)
    with (folder / "used").open() as another:
        fcntl.flock(another, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert not ConversionShelf(tmp_path).remove(ConversionShelf(tmp_path).everything()[0])
