"""llama.cpp's programs, built once into the benchmark's cache folder.

The sources are those inside the `llama-cpp-python` package on PyPI. Its wheel would contain libraries alone, and its
own server answers one request at a time; the same sources hold llama.cpp's server, which batches, and the worker that
the RPC option is for. So these are built, with an environment of their own that has nothing of ours.
Usage: python -m tests.bench.peers.build
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import ClusterError
from tests.bench.model import cache_folder

VERSION = "0.3.36"
_PACKAGE = "llama-cpp-python"
_TOOLS = ("cmake", "ninja", "scikit-build-core")
SERVER, WORKER, QUANTISER = PROGRAMS = ("llama-server", "ggml-rpc-server", "llama-quantize")
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",
    "GGML_RPC": "ON",
    "GGML_NATIVE": "ON",  # for this very processor
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # it would be downloaded
    "LLAMA_OPENSSL": "OFF",
}
_BUILD_S = 3600.0


def program(name: str) -> Path:
    """A built program; ClusterError where nobody has built it."""
    path = _folder() / "bin" / name
    if not path.is_file():
        raise ClusterError(f"llama.cpp is not built here: {path} is missing; `make bench-peers` builds it")
    return path


def build() -> None:
    """Have all programs; minutes the first time."""
    if all((_folder() / "bin" / name).is_file() for name in PROGRAMS):
        return
    _folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="potluck-llama-", dir=_folder().parent) as work:
        tools, built = Path(work) / "tools", Path(work) / "build"
        _run([sys.executable, "-m", "venv", str(tools)])
        pip = [str(tools / "bin" / "pip")]
        _run([*pip, "install", "--quiet", *_TOOLS])
        source = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", work]
        _run([*pip, "download", "--quiet", *source, f"{_PACKAGE}=={VERSION}"])
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as sources:
            sources.extractall(work, filter="data")
        (vendored,) = Path(work).glob("*/vendor/llama.cpp")
        settings = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
        ninja = str(tools / "bin" / "ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        _run([str(tools / "bin" / "cmake"), "-S", str(vendored), "-B", str(built), *generator, *settings])
        _run([ninja, "-C", str(built), *PROGRAMS])
        shutil.copytree(built / "bin", _folder() / "bin", symlinks=True, dirs_exist_ok=True)


def _folder() -> Path:
    return cache_folder() / f"llama.cpp-{VERSION}"


def _run(command: Sequence[str]) -> None:
    sys.stdout.write(f"$ {' '.join(command)}\n")
    sys.stdout.flush()
    try:
        subprocess.run(command, check=True, timeout=_BUILD_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(f"llama.cpp cannot be built here: {error}") from error


if __name__ == "__main__":
    build()
