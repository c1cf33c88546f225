"""Tasks that somebody owns: held, logged, ended."""

import asyncio
import gc
import logging

import pytest

from backends.tasks import Tasks


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_a_task_is_held_and_forgotten_when_it_is_done() -> None:
    tasks = Tasks("a:0")
    limiter = asyncio.Event()
    task = tasks.start(limiter.wait(), "wait")
    assert task.get_name() == "a:0:wait"
    assert len(tasks) == 1
    gc.collect()
    limiter.set()
    assert await task is True
    await asyncio.sleep(0)
    assert len(tasks) == 0


async def test_what_a_task_raises_is_logged_under_its_name(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks("a:0")

    async def fail() -> None:
        raise ValueError("broken")

    task = tasks.start(fail(), "watch")
    await asyncio.wait({task})
    await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.__dict__["task"] == "a:0:watch"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)
    assert len(tasks) == 0


async def test_close_waits_until_all_are_gone(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks("a:0")
    ended: list[str] = []

    async def tidy(name: str) -> None:
        try:
            await for_ever()
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    started = [tasks.start(tidy(name), name) for name in "abc"]
    await asyncio.sleep(0)
    await tasks.close()
    assert sorted(ended) == ["a", "b", "c"]
    assert all(task.cancelled() for task in started)
    assert caplog.records == []


async def test_close_survives_a_task_that_fails_while_it_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks("a:0")

    async def stumble() -> None:
        try:
            await for_ever()
        finally:
            raise RuntimeError("on the way out")

    tasks.start(stumble(), "stumble")
    await asyncio.sleep(0)
    await tasks.close()
    assert [record.message for record in caplog.records] == ["task failed"]


async def test_a_task_may_close_its_own_owner() -> None:
    tasks = Tasks("a:0")
    other = tasks.start(for_ever(), "other")
    own = tasks.start(tasks.close(), "closer")
    await own
    assert other.cancelled()
    assert not own.cancelled()


async def test_close_with_nothing_to_do() -> None:
    await Tasks("a:0").close()
