"""A token's way over a link by itself: its frame there on one connection, its outcome back on another, as between two
nodes, and pauses as long as their stages compute.

Nothing can ride with a message on a connection that carries messages one way only: each is acknowledged by a frame of
its own, which holds up the message after it where the link makes it late. An echo on one connection does not show that.
Usage of the children: python -m tests.bench.trip HOST, or ADDRESS BYTES HERE_S THERE_S TRIPS.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from statistics import fmean

from cluster.transport import ByteStream, Credentials, open_stream
from tests.bench.link import Direction, Link
from tests.bench.two_ends import answer, number_between

_OUTCOME = bytes(128)
_RESULTS = b"results"
_WARM_TRIPS = 10
_HEADERS_BYTES = 66
"""Of Ethernet, IP and TCP around a message; an acknowledgement has nothing else."""

_FLOOR_TRIPS = 20_000


def floor_s(link: Link, frame_bytes: int, pauses_s: tuple[float, float]) -> float:
    """Mean seconds of both ways, by hand: of four frames a token, in order, each may be late. `pauses_s` are before the
    message there and before the answer; an acknowledgement leaves when a message has come."""
    there, back = Direction(link, 1), Direction(link, 2)

    def cross(way: Direction, size: int, at_s: float) -> float:
        way.take(bytes(size), at_s)
        return way.emptied_s()

    now_s = 0.0
    for _ in range(_FLOOR_TRIPS):
        cross(there, _HEADERS_BYTES, now_s)
        now_s = cross(there, _HEADERS_BYTES + frame_bytes, now_s + pauses_s[0])
        cross(back, _HEADERS_BYTES, now_s)
        now_s = cross(back, _HEADERS_BYTES + len(_OUTCOME), now_s + pauses_s[1])
    return now_s / _FLOOR_TRIPS - sum(pauses_s)


def trip_alone(
    payload_bytes: int, pauses_s: tuple[float, float], *, host: str, there: Sequence[str], trips: int
) -> float:
    """Mean seconds of both ways, measured between this machine and `host`, on which commands run behind `there`."""
    return number_between("tests.bench.trip", (payload_bytes, *pauses_s, trips), host=host, there=there)


async def _answer(host: str) -> None:
    results: asyncio.Future[ByteStream] = asyncio.get_running_loop().create_future()

    async def handler(stream: ByteStream) -> None:
        if await stream.read() == _RESULTS:
            results.set_result(stream)
            await stream.read()  # until the other side has gone
            return
        back = await results
        while (message := await stream.read()) is not None:
            await asyncio.sleep(float(message[:32]))
            await back.write(_OUTCOME)

    await answer(host, handler)


async def _ask(address: str, payload_bytes: int, pauses_s: tuple[float, float], trips: int) -> None:
    frames, results = (open_stream(Credentials(), address) for _ in range(2))
    await results.write(_RESULTS)
    await frames.write(b"frames")
    message = f"{pauses_s[1]:<32}".encode().ljust(payload_bytes)
    times = []
    for _ in range(_WARM_TRIPS + trips):
        await asyncio.sleep(pauses_s[0])
        began_s = time.perf_counter()
        await frames.write(message)
        await results.read()
        times.append(time.perf_counter() - began_s - pauses_s[1])
    await asyncio.gather(frames.close(), results.close())
    sys.stdout.write(f"{fmean(times[-trips:])}\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [host]:
            asyncio.run(_answer(host))
        case [address, payload_bytes, here_s, there_s, trips]:
            asyncio.run(_ask(address, int(payload_bytes), (float(here_s), float(there_s)), int(trips)))
