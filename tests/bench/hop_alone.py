"""A hop by itself: frames of a boundary's size, echoed between two processes over the data plane's streams.

Half of a round trip, with nothing around it: no codec, no engine. Before it sends, each end reads through more memory
than caches hold, as stages do with their weights: what a hop needs is then where it is in a cluster, far away.
Usage of the children: python -m tests.bench.hop_alone HOST, or ADDRESS BYTES ROUND_TRIPS.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from cluster.transport import ByteStream, Credentials, open_stream
from tests.bench.two_ends import answer, number_between

_ROUND_TRIPS = 200
_WARM_TRIPS = 20
_READ_BYTES = 64 << 20
_SECONDS_BYTES = 32
"""At the beginning of an answer: how long its sender read before."""


def hop_alone(
    payload_bytes: int, *, host: str = "127.0.0.1", there: Sequence[str] = (), round_trips: int = _ROUND_TRIPS
) -> float:
    """Mean seconds of one hop, each end on a node's core: over loopback, or to the machine `host`, on which commands
    run behind `there`."""
    numbers = (payload_bytes, round_trips)
    return number_between("tests.bench.hop_alone", numbers, host=host, there=there)


class _Weights:
    def __init__(self) -> None:
        self._numbers = np.ones(_READ_BYTES // 4, dtype=np.float32)

    def read(self) -> float:
        """Once, from end to end; the seconds that it took."""
        began_s = time.perf_counter()
        self._numbers.max()
        return time.perf_counter() - began_s


async def _echo(host: str) -> None:
    weights = _Weights()

    async def handler(stream: ByteStream) -> None:
        while (message := await stream.read()) is not None:
            await stream.write(f"{weights.read():<{_SECONDS_BYTES}}".encode() + message[_SECONDS_BYTES:])

    await answer(host, handler)


async def _ask(address: str, payload_bytes: int, round_trips: int) -> None:
    stream = open_stream(Credentials(), address)
    weights, message, times = _Weights(), bytes(max(payload_bytes, _SECONDS_BYTES)), []
    for _ in range(_WARM_TRIPS + round_trips):
        weights.read()
        began_s = time.perf_counter()
        await stream.write(message)
        echoed = await stream.read()
        assert echoed is not None, "the other end has gone"
        times.append(time.perf_counter() - began_s - float(echoed[:_SECONDS_BYTES]))
    await stream.close()
    sys.stdout.write(f"{fmean(times[-round_trips:]) / 2}\n")


if __name__ == "__main__":
    asyncio.run(_echo(sys.argv[1]) if len(sys.argv) == 2 else _ask(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
