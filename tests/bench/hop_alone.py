"""A hop by itself: frames of a boundary's size, echoed between two processes over the data plane's streams.

Half of a round trip, with nothing around it: no codec, no engine. Usage of the child: python -m tests.bench.hop_alone
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from statistics import median

from cluster.errors import ClusterError
from cluster.transport import ByteStream, Credentials, create_server, data_service, open_stream
from tests.bench.cores import node_core, pinned

_ROUND_TRIPS = 2000
_WARM_UP = 200


def hop_alone(payload_bytes: int) -> float:
    """Seconds of one hop over loopback, each end on a node's core."""
    command = [sys.executable, "-m", "tests.bench.hop_alone"]
    with subprocess.Popen([*pinned([node_core(0)]), *command], stdout=subprocess.PIPE, text=True) as echo:
        try:
            assert echo.stdout is not None
            address = echo.stdout.readline().strip()
            done = subprocess.run(
                [*pinned([node_core(1)]), *command, address, str(payload_bytes)],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
        finally:
            echo.kill()
    if done.returncode != 0:
        raise ClusterError(f"a hop could not be measured alone: {done.stderr[-500:]}")
    return float(done.stdout)


async def _echo() -> None:
    async def handler(stream: ByteStream) -> None:
        while (message := await stream.read()) is not None:
            await stream.write(message)

    server = create_server()
    server.add_generic_rpc_handlers([data_service(handler)])
    port = Credentials().bind(server, "127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"127.0.0.1:{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


async def _ask(address: str, payload_bytes: int) -> None:
    stream = open_stream(Credentials(), address)
    message, times = bytes(payload_bytes), []
    for _ in range(_WARM_UP + _ROUND_TRIPS):
        began_s = time.perf_counter()
        await stream.write(message)
        await stream.read()
        times.append(time.perf_counter() - began_s)
    await stream.close()
    sys.stdout.write(f"{median(times[_WARM_UP:]) / 2}\n")


if __name__ == "__main__":
    asyncio.run(_ask(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else _echo())
