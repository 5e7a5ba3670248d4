"""What libraries keep of products in 16 bits on a processor is bounded, however many shapes a node has met."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.quantities import MIB
from tests.checkpoints import make_checkpoint

SHAPES = 60
"""Numbers of rows, each of which several products have."""

KEPT_BYTES_MAX = 32 * MIB
"""What 32 products in each of two libraries take, twice over; without a bound these shapes left 165 MiB."""

SCRIPT = f"""
import ctypes, gc, sys
from pathlib import Path
from cluster.steps import Row
from cluster.types import SequenceId
from node.engines.torch.engine import TorchEngine
from tests.oracle.pipelines import stage_specs

class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

def in_use():
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Counts
    counts = mallinfo2()
    return counts.uordblks + counts.hblkhd

engine = TorchEngine()
engine.load(stage_specs(Path(sys.argv[1]), ())[0], lambda progress: None)

def compute(tokens):
    engine.step([Row(SequenceId(1), 0, (1,) * tokens, None)], None)
    engine.drop(SequenceId(1))

compute(1)
before = in_use()
for tokens in range(2, 2 + {SHAPES}):
    compute(tokens)
print(in_use() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_shapes_that_do_not_come_again_leave_little_behind(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, dtype="bfloat16", hidden_size=256, intermediate_size=512, layers=2)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) <= KEPT_BYTES_MAX
