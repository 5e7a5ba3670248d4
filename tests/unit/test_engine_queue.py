"""node/engine_queue.py: work goes to the engine thread in order and without waiting for the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor

from node.engine_queue import EngineQueue

_PATIENCE_S = 30.0


def run(test: Callable[[ThreadPoolExecutor], Coroutine[None, None, None]]) -> None:
    with ThreadPoolExecutor(1) as thread:
        asyncio.run(asyncio.wait_for(test(thread), _PATIENCE_S))


def nothing_fails(error: BaseException) -> None:
    raise AssertionError(error)


def test_results_come_in_order_on_the_loops_own_thread() -> None:
    async def test(thread: ThreadPoolExecutor) -> None:
        results: asyncio.Queue[tuple[int, bool]] = asyncio.Queue()
        own = threading.get_ident()

        def work(item: int) -> tuple[int, bool]:
            assert threading.get_ident() != own
            return item * 10, True

        def done(result: tuple[int, bool]) -> None:
            assert threading.get_ident() == own
            results.put_nowait(result)

        queue = EngineQueue(thread, work, done, nothing_fails)
        for round_ in range(50):  # the thread runs out of work in between
            for item in range(5):
                queue.put(round_ * 5 + item)
            assert [(await results.get())[0] for _ in range(5)] == [(round_ * 5 + item) * 10 for item in range(5)]

    run(test)


def test_the_thread_goes_on_while_the_loop_is_held_up() -> None:
    async def test(thread: ThreadPoolExecutor) -> None:
        third = threading.Event()
        done: asyncio.Queue[int] = asyncio.Queue()

        def work(item: int) -> int:
            if item == 3:
                third.set()
            return item

        queue = EngineQueue(thread, work, done.put_nowait, nothing_fails)
        for item in (1, 2, 3):
            queue.put(item)
        assert third.wait(_PATIENCE_S)  # this blocks the loop, which has seen no result yet
        assert done.empty()
        assert [await done.get() for _ in range(3)] == [1, 2, 3]

    run(test)


def test_a_result_is_on_its_way_before_the_next_item_begins() -> None:
    async def test(thread: ThreadPoolExecutor) -> None:
        results: asyncio.Queue[int] = asyncio.Queue()
        seen: list[int] = []
        gate = threading.Event()

        def work(item: int) -> int:
            gate.wait(_PATIENCE_S)
            seen.append(item)
            return item

        queue = EngineQueue(thread, work, results.put_nowait, nothing_fails, head_start_s=_PATIENCE_S)
        for item in range(20):
            queue.put(item)
        gate.set()
        for item in range(20):
            assert await results.get() == item
            await asyncio.sleep(0.001)  # the thread could begin now
            assert seen == [*range(item + 1)]
            queue.taken()

    run(test)


def test_after_a_failure_nothing_more_is_taken() -> None:
    async def test(thread: ThreadPoolExecutor) -> None:
        failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        seen: list[int] = []
        gate = threading.Event()

        def work(item: int) -> int:
            gate.wait(_PATIENCE_S)
            seen.append(item)
            raise ValueError("no")

        queue = EngineQueue(thread, work, nothing_fails, failed.set_result)
        for item in range(3):
            queue.put(item)
        gate.set()
        assert isinstance(await failed, ValueError)
        queue.put(4)
        await asyncio.get_running_loop().run_in_executor(thread, lambda: None)  # it has done what it was given
        assert seen == [0]

    run(test)


def test_closing_forgets_what_waits_and_lets_the_thread_do_something_else_next() -> None:
    async def test(thread: ThreadPoolExecutor) -> None:
        begun, gate = threading.Event(), threading.Event()
        seen: list[int] = []

        def work(item: int) -> int:
            begun.set()
            gate.wait(_PATIENCE_S)
            seen.append(item)
            return item

        queue = EngineQueue(thread, work, lambda _: None, nothing_fails)
        for item in range(3):
            queue.put(item)
        begun.wait(_PATIENCE_S)
        assert len(queue) == 2
        queue.close()
        assert len(queue) == 0
        after = asyncio.get_running_loop().run_in_executor(thread, lambda: tuple(seen))
        gate.set()
        assert await after == (0,)

    run(test)
