"""Makes .venv: chooses the right torch build, installs Potluck with both engines and the development tools.

Run by `make setup` with the system's Python and nothing else: no root, no uv. A stamp makes the second run
instant until pyproject.toml or constraints.txt change.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".potluck"
TORCH = "2.13.0"
ROOM_BYTES = {"cpu": 3 << 30, "default": 10 << 30}
"""Free disk to begin with: what the environment takes (1.4 GiB and, with the CUDA libraries, 4.9 GiB, measured)
and as much again while wheels are unpacked."""


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever python3 the machine has
        return fail(
            f"Potluck needs Python 3.11 or newer, and {sys.executable} is {platform.python_version()}.",
            "Install a newer one and name it: make setup PYTHON=python3.12",
        )
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    build = torch_build()
    free_bytes = shutil.disk_usage(ROOT).free
    if free_bytes < ROOM_BYTES[build]:
        return fail(
            f"{ROOT} has {free_bytes / 2**30:.1f} GiB free; {ROOM_BYTES[build] / 2**30:.0f} GiB are needed.",
            "Free some disk, or clone the project elsewhere.",
        )
    began = time.monotonic()
    print(f"Setting up {VENV} with Python {platform.python_version()} …", flush=True)
    if not (VENV / "bin" / "python").exists():
        venv.create(VENV, with_pip=True)
    try:
        pip("--upgrade", "pip>=25.1")  # knows dependency groups
        install_torch(build)
        print("Installing Potluck, its engines and the development tools …", flush=True)
        pip("--editable", ".[torch,mlx]" if mlx_exists() else ".[torch]", "--group", "dev")
    except subprocess.CalledProcessError as error:
        return fail(
            f"An install step failed with exit code {error.returncode}; what pip said is above.",
            "Usually: no network (try again: finished downloads are kept), a proxy that pip does not know (set "
            "HTTPS_PROXY), or a full disk. `make clean` starts over.",
        )
    STAMP.write_text(wanted)
    print(f"Done in {time.monotonic() - began:.0f} s. {installed_torch()} The command is {VENV / 'bin' / 'potluck'}.")
    return 0


def fingerprint() -> str:
    """Changes whenever the environment has to."""
    parts = [platform.python_version(), str(ROOT)]
    parts += [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt", "deploy/set_up.py")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def torch_build() -> str:
    """`cpu` on a Linux machine without an NVIDIA driver, else whatever is torch's default for the platform."""
    if platform.system() != "Linux":
        print(f"torch: the default build for {platform.system()}, which has no CUDA libraries.", flush=True)
        return "cpu"
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if driver or Path("/dev/dxg").exists():  # the latter is the GPU inside WSL2
        print("torch: an NVIDIA driver is here, so the default build with CUDA (several GB to download).", flush=True)
        return "default"
    print("torch: no NVIDIA driver is here, so the CPU build (about 190 MB to download).", flush=True)
    return "cpu"


def install_torch(build: str) -> None:
    """The CPU build for Linux lies in an index of its own. Where pip is configured with it, pip gets it; else uv
    does, which knows that index by itself. The other builds come with the engines."""
    if build != "cpu" or platform.system() != "Linux" or torch_is_there():
        return
    try:
        pip(f"torch=={TORCH}+cpu", second_way=True)
    except subprocess.CalledProcessError:
        pip("uv")
        command = [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(VENV / "bin" / "python")]
        run([*command, "--torch-backend", "cpu", f"torch=={TORCH}"])


def torch_is_there() -> bool:
    return f"torch-{TORCH}" in " ".join(path.name for path in VENV.glob("lib/*/site-packages/torch-*.dist-info"))


def installed_torch() -> str:
    """Which torch it became, and how large."""
    folder = next(iter(VENV.glob("lib/*/site-packages/torch")), None)
    if folder is None:
        return "torch is not installed."
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    script = "from importlib.metadata import version; print(version('torch'))"
    version = subprocess.run([VENV / "bin" / "python", "-c", script], capture_output=True, text=True, check=True).stdout
    return f"torch {version.strip()} takes {size / 2**20:.0f} MiB."


def mlx_exists() -> bool:
    """MLX has builds for Apple Silicon and Linux, none for Intel Macs."""
    return platform.system() == "Linux" or (platform.system() == "Darwin" and platform.machine() == "arm64")


def pip(*arguments: str, second_way: bool = False) -> None:
    """Install under the constraints. A failure that has a second way is not shown."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--constraint", "constraints.txt", *arguments]
    if sys.stdout.isatty() and not second_way:
        run(command)  # a person sees the downloads move
        return
    try:
        run([*command, "--quiet", "--progress-bar", "off"], capture=True)
    except subprocess.CalledProcessError as error:
        if not second_way:
            print(error.stdout, file=sys.stderr)
        raise


def run(command: list[str], *, capture: bool = False) -> None:
    output = subprocess.PIPE if capture else None
    environment = {**os.environ, "PIP_NO_INPUT": "1"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, text=True, stdout=output, stderr=subprocess.STDOUT)


def fail(what: str, advice: str) -> int:
    print(f"\nmake setup: {what}\n{advice}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
