"""Generates cluster/wire/ from proto/, or (without --write) fails when what is committed differs from it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
WIRE = Path("cluster") / "wire"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the files instead of comparing them")
    arguments = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # protoc's plugins
    if arguments.write:
        return generate(ROOT)
    with tempfile.TemporaryDirectory() as scratch:
        if code := generate(Path(scratch)):
            return code
        fresh = {path.name: path.read_text() for path in (Path(scratch) / WIRE).glob("*_pb2*")}
    committed = {path.name: path.read_text() for path in (ROOT / WIRE).glob("*_pb2*")}
    differing = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if differing:
        print(f"cluster/wire/ does not match proto/: {', '.join(differing)}. Run `make proto` and commit.")
        return 1
    return 0


def generate(target: Path) -> int:
    protos = [str(path.relative_to(ROOT / "proto")) for path in sorted((ROOT / "proto").rglob("*.proto"))]
    plugins = ("python", "mypy", "grpc_python", "mypy_grpc")
    outputs = [f"--{plugin}_out={'quiet:' if 'mypy' in plugin else ''}{target}" for plugin in plugins]
    return int(protoc.main(["protoc", f"-I{ROOT / 'proto'}", *outputs, *protos]))


if __name__ == "__main__":
    sys.exit(main())
