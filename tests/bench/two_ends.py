"""Two processes that measure what lies between them: one answers over the data plane's streams, one asks and prints a
number. Each is on a node's core, as stages are; the one that answers may be on another machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence

from cluster.errors import ClusterError
from cluster.transport import ByteStream, Credentials, create_server, data_service
from tests.bench.cores import node_core, pinned

_MEASURING_S = 300


def number_between(module: str, numbers: Sequence[float], *, host: str, there: Sequence[str]) -> float:
    """What `module` prints when it is given an address and `numbers`, while it answers there when it is given `host`,
    on which commands run behind `there`."""
    command = [sys.executable, "-m", module]
    answering = [*there, *pinned([node_core(1)]), *command, host]
    with subprocess.Popen(answering, stdout=subprocess.PIPE, text=True) as answers:
        try:
            assert answers.stdout is not None
            address = answers.stdout.readline().strip()
            done = subprocess.run(
                [*pinned([node_core(0)]), *command, address, *map(str, numbers)],
                capture_output=True, text=True, timeout=_MEASURING_S, check=False,
            )  # fmt: skip
        finally:
            answers.kill()
    if done.returncode != 0:
        raise ClusterError(f"{module} could not measure: {done.stderr[-500:]}")
    return float(done.stdout)


async def answer(host: str, handler: Callable[[ByteStream], Awaitable[None]]) -> None:
    """Say at which address of `host` streams are answered, and answer them until the process is ended."""
    server = create_server()
    server.add_generic_rpc_handlers([data_service(handler)])
    port = Credentials().bind(server, f"{host}:0")
    await server.start()
    sys.stdout.write(f"{host}:{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()
