"""A hop by itself: frames of a boundary's size, echoed between two processes over the data plane's streams.

Half of a round trip, with nothing around it: no codec, no engine.
Usage of the children: python -m tests.bench.hop_alone HOST, or ADDRESS BYTES ROUND_TRIPS.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from statistics import fmean

from cluster.transport import ByteStream, Credentials, open_stream
from tests.bench.two_ends import answer, number_between

_ROUND_TRIPS = 2000


def hop_alone(
    payload_bytes: int, *, host: str = "127.0.0.1", there: Sequence[str] = (), round_trips: int = _ROUND_TRIPS
) -> float:
    """Mean seconds of one hop, each end on a node's core: over loopback, or to the machine `host`, on which commands
    run behind `there`."""
    numbers = (payload_bytes, round_trips)
    return number_between("tests.bench.hop_alone", numbers, host=host, there=there)


async def _echo(host: str) -> None:
    async def handler(stream: ByteStream) -> None:
        while (message := await stream.read()) is not None:
            await stream.write(message)

    await answer(host, handler)


async def _ask(address: str, payload_bytes: int, round_trips: int) -> None:
    stream = open_stream(Credentials(), address)
    message, times = bytes(payload_bytes), []
    for _ in range(round_trips + round_trips // 10):
        began_s = time.perf_counter()
        await stream.write(message)
        await stream.read()
        times.append(time.perf_counter() - began_s)
    await stream.close()
    sys.stdout.write(f"{fmean(times[-round_trips:]) / 2}\n")


if __name__ == "__main__":
    asyncio.run(_echo(sys.argv[1]) if len(sys.argv) == 2 else _ask(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
