"""Downloads the needed files of a model from the Hugging Face hub into that library's own cache.

Small files are huggingface_hub's work, checked in `coordinator.hub_whole`. Weights are streamed by
`coordinator.hub_stream`, because the library begins a broken-off file from zero, and a shard takes many GiB. They
become blobs of its cache, which it then links: models that other programs downloaded are found here, and theirs there.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from cluster.errors import ModelError
from cluster.limits import INDEX_BYTES_MAX
from cluster.models.card import is_card_file
from cluster.models.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from cluster.models.hashing import Advance, CountProgress, counting
from cluster.models.manifest import is_small_model_file
from cluster.models.strict_json import read_object
from cluster.quantities import format_bytes
from coordinator.gguf.source import SUFFIX, check_listed, part_names
from coordinator.hub_errors import Unreachable, explained
from coordinator.hub_hashes import HubFile
from coordinator.hub_patience import patiently
from coordinator.hub_stream import BlobStream, part_path
from coordinator.hub_whole import fetch_whole

_log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
_POLL_S = 0.25
_FILES_AT_ONCE = 4  # one stream rarely fills a fast line; more only multiply what a break leaves half done


def download(
    repository: str,
    revision: str | None,
    progress: CountProgress | None,
    cancelled: threading.Event,
    hashes: Path | None = None,
    gguf: str | None = None,
) -> tuple[Path, str]:
    """The folder with the model's needed files, and the commit that `revision` means now. What is known of their
    tensors' hashes when they are here is remembered in `hashes`. With `gguf` only that file's model is needed."""
    disable_progress_bars()  # ours is shown instead
    branch = revision or constants.DEFAULT_REVISION
    cached = find_cached(repository, branch, gguf)
    if constants.HF_HUB_OFFLINE:
        if cached is None:
            raise ModelError(
                f"{repository} at {branch} is not complete in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
                "unset it once to download the model"
            )
        return cached
    if cached is not None and cached[1] == branch:
        return cached  # a commit never changes, so there is nothing to ask
    try:
        with explained(repository, branch):
            if cached is None:
                commit, files = patiently(lambda: list_files(repository, branch, gguf), repository, cancelled)
            else:  # which serves as well as waiting
                commit, files = list_files(repository, branch, gguf)
    except Unreachable:
        if cached is None:
            raise
        _log.warning("%s cannot be reached; using %s as of commit %s", constants.ENDPOINT, repository, cached[1][:12])
        return cached
    with explained(repository, branch):
        folder = _Download(repository, commit, files, cancelled, hashes, gguf).run(progress)
    _remember_revision(repository, branch, commit)
    return folder, commit


def address(repository: str) -> str:
    """Where a person finds the model."""
    return f"{constants.ENDPOINT}/{repository}"


def find_cached(repository: str, revision: str, gguf: str | None = None) -> tuple[Path, str] | None:
    """The cached snapshot of `revision` and its commit, if the configuration and all weights are there (or `gguf`)."""
    if gguf is not None:
        parts = [try_to_load_from_cache(repository, name, revision=revision) for name in part_names(gguf)]
        here = [Path(part).parent for part in parts if isinstance(part, str)]
        return (here[0], here[0].name) if len(here) == len(parts) else None
    config = try_to_load_from_cache(repository, CONFIG_FILE, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        weights = weights_of({path.name for path in folder.iterdir()}, folder)
    except ModelError:
        return None
    is_whole = bool(weights) and all((folder / name).is_file() for name in weights)
    return (folder, folder.name) if is_whole else None


def list_files(repository: str, revision: str, gguf: str | None = None) -> tuple[str, dict[str, HubFile]]:
    """The commit that `revision` means now, and the files in the repository's top folder, what is needed among them."""
    info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
    listed = [HubFile.of(sibling) for sibling in info.siblings or ()]
    files = {file.name: file for file in listed if "/" not in file.name}
    if info.sha is None:
        raise ModelError(f"{constants.ENDPOINT} names no commit for {repository}; is HF_ENDPOINT a hub?")
    if gguf is not None:
        check_listed(gguf, files, repository)
        return info.sha, files
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights and (ggufs := sorted(name for name in files if name.endswith(SUFFIX))):
        raise ModelError(f"{repository} holds GGUF files: name one of them, such as {repository}/{ggufs[0]}")
    if CONFIG_FILE not in files or not weights:
        missing = f"no {CONFIG_FILE}" if CONFIG_FILE not in files else "no safetensors files"
        raise ModelError(
            f"{repository} has {missing}, so Potluck cannot serve it. Look for the original model or a version in "
            "safetensors: Potluck does not read .bin or ONNX files"
        )
    return info.sha, files


def weights_of(names: set[str], folder: Path) -> list[str]:
    """Which weight files count among `names`, by the same rule as cluster.models.checkpoint. Some repositories
    hold the same weights twice, in other files that no index lists."""
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    if INDEX_FILE not in names:
        return sorted(name for name in names if name.endswith(".safetensors"))
    weight_map = read_object(folder / INDEX_FILE, INDEX_BYTES_MAX).get("weight_map")
    listed = sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []
    absent = [file for file in listed if file not in names]
    if absent or not listed:
        raise ModelError(f"{INDEX_FILE} lists weight files that are not there: {', '.join(absent[:3]) or 'none'}")
    return listed


class _Download:
    """One model's download at one commit."""

    def __init__(
        self,
        repository: str,
        commit: str,
        files: dict[str, HubFile],
        cancelled: threading.Event,
        hashes: Path | None,
        gguf: str | None,
    ) -> None:
        self._hashes = hashes
        self._gguf = gguf
        self._repository = repository
        self._commit = commit
        self._files = files
        self._cancelled = cancelled
        self._stop = threading.Event()  # of the streams: set when one of them fails, too
        cache = Path(constants.HF_HUB_CACHE).expanduser()
        self._blobs = cache / repo_folder_name(repo_id=repository, repo_type="model") / "blobs"

    def run(self, progress: CountProgress | None) -> Path:
        small = [file for file in self._files.values() if is_small_model_file(file.name) or is_card_file(file.name)]
        if self._gguf is None:
            self._fetch_whole(small)  # the index among them says which weights count
            weights = [self._files[name] for name in weights_of(set(self._files), self._snapshot)]
        else:
            small, weights = [], [self._files[name] for name in part_names(self._gguf)]
            self._blobs.mkdir(parents=True, exist_ok=True)
        self._warn_of_unchecked([*small, *weights])
        streamed = [file for file in weights if self._is_streamed(file)]
        self._check_room(weights)
        total_bytes = sum(file.size_bytes for file in (*small, *weights))
        advance = counting(total_bytes, progress)
        advance(total_bytes - sum(file.size_bytes for file in streamed))
        side_by_side([partial(self._stream, file, advance) for file in streamed], self._cancelled, self._stop)
        # Blobs are only linked: those streamed now were checked, others are once their tensors are hashed.
        self._fetch_whole([replace(file, sha256="") if self._is_here(file) else file for file in weights])
        return self._snapshot

    @property
    def _snapshot(self) -> Path:
        return self._blobs.parent / "snapshots" / self._commit

    def _fetch_whole(self, files: Sequence[HubFile]) -> None:
        """Have the library fetch or link these files, and check them."""
        side_by_side([partial(fetch_whole, self._repository, file, self._commit) for file in files], self._cancelled)

    def _warn_of_unchecked(self, files: Sequence[HubFile]) -> None:
        names = [file.name for file in files if not file.digest]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            _log.warning(
                "%s tells no hashes of %s%s: %s is served as it arrived, and only its sizes are checked",
                constants.ENDPOINT, ", ".join(names[:3]), more, self._repository,
            )  # fmt: skip

    def _is_streamed(self, file: HubFile) -> bool:
        """Not what is here, not what the hub gives no hash or no size for, and not what it refuses to plain HTTP."""
        is_wanted = bool(file.sha256) and not self._is_here(file)
        return is_wanted and 0 < file.size_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE

    def _is_here(self, file: HubFile) -> bool:
        return bool(file.sha256) and (self._blobs / file.sha256).exists()

    def _check_room(self, weights: Sequence[HubFile]) -> None:
        missing = [file for file in weights if not self._is_here(file)]
        parts = (part_path(self._blobs, file) for file in missing)
        needed_bytes = sum(file.size_bytes for file in missing)
        needed_bytes -= sum(part.stat().st_size for part in parts if part.exists())
        free_bytes = shutil.disk_usage(self._blobs).free
        if needed_bytes > free_bytes:
            raise ModelError(
                f"{self._repository} needs {format_bytes(needed_bytes)} on the disk of {self._blobs}, which has "
                f"{format_bytes(free_bytes)} free: {format_bytes(needed_bytes - free_bytes)} too little. Free some "
                "space there, or set HF_HOME to a folder on a larger disk"
            )

    def _stream(self, file: HubFile, advance: Advance) -> None:
        url = hf_hub_url(self._repository, file.name, revision=self._commit)
        BlobStream(url, file, self._blobs, advance, self._stop, self._hashes).fetch()


def _remember_revision(repository: str, revision: str, commit: str) -> None:
    """Note which commit a branch means, only now that all of it is here, so that a start without network finds it."""
    if revision != commit:
        storage = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=repository, repo_type="model")
        reference = storage / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, encoding="ascii")


def side_by_side(
    jobs: Sequence[Callable[[], object]], cancelled: threading.Event, stop: threading.Event | None = None
) -> None:
    """Do all jobs, a few at a time; `stop` is set when one fails or `cancelled` is. Nobody waits for a job that a
    silent hub holds: its thread keeps no process alive, and what it has written so far is good."""
    waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    over = stop or threading.Event()

    def work() -> None:
        while not over.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                job()
                ended.put(None)
            except BaseException as error:  # noqa: BLE001 - carried over to whoever waits
                ended.put(error)

    for job in jobs:
        waiting.put(job)
    for number in range(min(_FILES_AT_ONCE, len(jobs))):
        threading.Thread(target=work, name=f"download {number}", daemon=True).start()
    try:
        left = len(jobs)
        while left:
            if cancelled.is_set():
                raise ModelError("the download was broken off; it goes on there the next time")
            with contextlib.suppress(queue.Empty):
                error = ended.get(timeout=_POLL_S)
                left -= 1
                if error is not None:
                    raise error
    finally:
        over.set()
