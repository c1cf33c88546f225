"""Threads for large bodies: the event loop goes on, and they are few."""

import asyncio
import threading

import pytest

from gateway.forward.body_workers import HUGE, THREADS, BodyWorkers


async def test_work_is_done_in_another_thread_and_its_errors_come_back() -> None:
    workers = BodyWorkers()
    assert await workers.run(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await workers.run(lambda: 1 // 0)
    workers.close()


async def test_threads_are_few_and_what_waits_can_be_cancelled() -> None:
    workers, begun, hold = BodyWorkers(), threading.Semaphore(0), threading.Event()
    done: list[int] = []

    def work(number: int) -> None:
        begun.release()
        assert hold.wait(30)
        done.append(number)

    running = [asyncio.ensure_future(workers.run(lambda n=n: work(n))) for n in range(THREADS)]  # type: ignore[misc]
    for _ in running:
        await asyncio.to_thread(begun.acquire)
    waiting = asyncio.ensure_future(workers.run(lambda: work(THREADS)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not begun.acquire(blocking=False), "no thread is free for it"
    hold.set()
    await asyncio.gather(*running)
    workers.close()
    assert sorted(done) == list(range(THREADS))


async def test_a_huge_body_is_worked_on_alone_and_holds_up_no_other() -> None:
    workers, begun, hold = BodyWorkers(), threading.Semaphore(0), threading.Event()

    def work() -> str:
        begun.release()
        assert hold.wait(30)
        return threading.current_thread().name

    running = [asyncio.ensure_future(workers.run(work, HUGE + 1)) for _ in range(2)]
    await asyncio.to_thread(begun.acquire)
    assert await workers.run(lambda: "small", HUGE) == "small"
    assert not begun.acquire(blocking=False), "the other one waits"
    hold.set()
    assert len(set(await asyncio.gather(*running))) == 1
    workers.close()
