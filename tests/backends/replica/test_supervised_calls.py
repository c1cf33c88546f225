"""Requests on a supervised backend that dies, wedges or hangs under them: what each is told, and what becomes of it."""

import asyncio
import os
from contextlib import suppress
from dataclasses import replace
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

from backends.domain.failure import Aftermath, Cause, Sent
from backends.domain.spec import RestartPolicy, Timeouts
from backends.domain.state import State
from backends.domain.work import Work
from backends.replica import remote_host
from backends.upstream.exchange import ExchangeError, Request
from backends.upstream.h1_client import H1Dialer
from tests.lives import HURRIED, until
from tests.stage import LONG, Scene, broken, prompt, rest, scene

pytestmark = pytest.mark.usefixtures("nothing_left")


# -- requests in flight ------------------------------------------------------------------------------------------------


async def test_everybody_in_flight_learns_why_it_died() -> None:
    """With checks so rare that three of them are not refused before a loaded machine tells of the exit."""
    async with scene(cadence=replace(HURRIED, probe_interval=1.0)) as s:
        await s.ready()
        calls = [s.ask("FAKE stall") for _ in range(2)]
        for _, exchange in calls:
            await exchange.start()
        os.kill(s.pid, SIGKILL)
        for failure in await asyncio.gather(*(broken(lease, exchange) for lease, exchange in calls)):
            assert (failure.verdict.cause, failure.verdict.exit, failure.suspect) == (Cause.KILLED, -SIGKILL, False)
            assert (failure.verdict.backend, failure.verdict.generation, failure.sent) == ("m:0", 1, Sent.MAYBE)
        await s.state(State.READY, generation=2)
        assert s.backend.inflight == 0


@pytest.mark.parametrize("mode", ["metal-oom", "metal-oom after=-1"])
async def test_who_was_alone_when_memory_ran_out(mode: str) -> None:
    async with scene() as s:
        await s.ready()
        failure = await broken(*s.ask(f"FAKE {mode}"), started=False)
        assert (failure.verdict.cause, failure.suspect, failure.alone, failure.verdict.exit) == (
            Cause.OOM,
            True,
            True,
            -6,
        )
        assert any("Insufficient Memory" in line for line in failure.verdict.evidence)
        assert failure.verdict.evidence == s.failure.evidence


@pytest.mark.parametrize("mode", ["eof", "cut-event"])
async def test_an_answer_that_ends_early_while_the_process_lives(mode: str) -> None:
    async with scene() as s:
        await s.ready()
        failure = await broken(*s.ask(f"FAKE {mode}"), started=False)
        assert (failure.verdict.cause, failure.verdict.aftermath, failure.truncated) == (
            Cause.NONE,
            Aftermath.ALIVE,
            True,
        )
        assert "it is still running" in failure.verdict.message
        assert (s.backend.state, s.backend.snapshot().generation) == (State.READY, 1)


async def test_calls_to_a_dead_life_are_told_what_ended_it() -> None:
    async with scene(restart=RestartPolicy(min_backoff=60.0)) as s:
        await s.ready()
        late = s.backend.admit()
        os.kill(s.pid, SIGKILL)
        await s.state(State.BACKOFF)
        exchange = late.open(prompt("hello"))
        failure = await broken(late, exchange, started=False)
        assert (failure.verdict.cause, failure.sent) == (Cause.KILLED, Sent.NOTHING)


# -- wedges ------------------------------------------------------------------------------------------------------------

SHORT = replace(LONG, progress=0.4)
TOUCHY = replace(HURRIED, abandoned_after=0.1)


async def strike(s: Scene, words: str) -> None:
    """From outside, so that nothing is in flight as far as the backend knows."""
    exchange = H1Dialer("127.0.0.1", next(iter(s.runtime.ports))).open(prompt(words))
    await exchange.start()
    with suppress(ExchangeError, TimeoutError):  # that it breaks off, or hangs, is what was asked for
        await asyncio.wait_for(rest(exchange), 0.2)
    exchange.close()


@pytest.mark.parametrize(("mode", "words"), [("wedge-0.31", "(_generate)"), ("wedge-0.32", "Slice indices")])
async def test_an_idle_one_whose_generation_thread_died_is_replaced(mode: str, words: str) -> None:
    async with scene(timeouts=SHORT) as s:
        await s.ready()
        await strike(s, f"FAKE {mode}")
        await s.state(State.READY, generation=2)
        assert (s.failure.aftermath, s.failure.backend) == (Aftermath.WEDGED, "m:0")
        assert "is being replaced" in s.failure.message
        assert any(words in line for line in s.failure.evidence)


@pytest.mark.parametrize("mode", ["wedge-0.31", "wedge-0.32", "oom-0.32", "native-hang"])
async def test_requests_on_one_that_wedges_are_told(mode: str) -> None:
    async with scene(timeouts=SHORT) as s:
        await s.ready()
        calls = [s.ask("FAKE stall after=0"), s.ask(f"FAKE {mode}")]
        failures = await asyncio.gather(*(broken(lease, exchange, started=False) for lease, exchange in calls))
        for failure in failures:
            assert (failure.verdict.aftermath, failure.alone) == (Aftermath.WEDGED, False)
            assert failure.verdict.cause is s.failure.cause
        if mode == "native-hang":
            assert s.failure.cause is Cause.STALLED
        if mode == "oom-0.32":
            assert s.failure.cause is Cause.OOM
        await s.state(State.READY, generation=2)


async def test_a_stopped_process_is_missed_although_nothing_is_in_flight() -> None:
    async with scene(timeouts=SHORT, cadence=replace(HURRIED, health_timeout=0.1)) as s:
        await s.ready()
        os.kill(s.pid, SIGSTOP)
        await s.state(State.READY, generation=2)
        assert (s.failure.cause, s.failure.aftermath) == (Cause.STALLED, Aftermath.WEDGED)


async def test_a_process_stopped_for_a_moment_is_not() -> None:
    async with scene() as s:
        await s.ready()
        os.kill(s.pid, SIGSTOP)
        lease, exchange = s.ask()
        os.kill(s.pid, SIGCONT)
        await exchange.start()
        assert b"[DONE]" in await rest(exchange)
        exchange.close()
        lease.release()
        assert (s.backend.state, s.backend.snapshot().generation) == (State.READY, 1)


def posts(s: Scene) -> int:
    return sum("POST" in line for line in s.backend.output.tail(1000))


async def leave_after_silence(s: Scene, words: str) -> None:
    lease, exchange = s.ask(words)
    await exchange.start()
    reading = asyncio.ensure_future(rest(exchange))
    await until(lambda: lease.silence(s.runtime.clock()) > TOUCHY.abandoned_after)
    lease.release()
    exchange.close()
    with suppress(ExchangeError):
        await reading


async def test_a_client_that_waited_in_vain_and_left_makes_us_look() -> None:
    async with scene(cadence=TOUCHY) as s:
        await s.ready()
        before = posts(s)
        await leave_after_silence(s, "FAKE stall")
        await until(lambda: posts(s) == before + 2, "its own and the canary")
        instance = s.backend._instance
        await until(lambda: instance is not None and not instance.monitor.suspected)
        assert (s.backend.state, s.backend.snapshot().generation) == (State.READY, 1)


async def test_and_one_that_hangs_is_found_out_by_it() -> None:
    async with scene(timeouts=SHORT, cadence=TOUCHY) as s:
        await s.ready()
        await leave_after_silence(s, "FAKE native-hang")
        await s.state(State.READY, generation=2)
        assert s.failure.cause is Cause.WEDGE
        assert "generates nothing" in s.failure.message


@pytest.mark.parametrize(
    ("words", "one_piece"),
    [
        ("FAKE prompt=16384 prefill-delay=0.1", False),  # 9 steps, and the output tells of each
        ("FAKE n=20 delay=0.05", True),
    ],
)
async def test_an_answer_in_one_piece_may_take_its_time(words: str, one_piece: bool) -> None:
    """Twice the time after which silence is a stall."""
    async with scene(timeouts=SHORT) as s:
        await s.ready()
        lease = s.backend.admit()
        request = prompt(words)
        body = request.body.replace(b'"stream": true', b'"stream": false')
        exchange = lease.open(Request("POST", request.path, body), Work(max_tokens=20, one_piece=one_piece))
        assert (await exchange.start()).status == 200
        assert b"usage" in await rest(exchange)
        exchange.close()
        lease.release()
        assert s.backend.snapshot().generation == 1


@pytest.mark.parametrize("is_mlx", [True, False])
async def test_a_foreign_server_may_have_to_load_its_idle_model_again(
    is_mlx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some unload it after a while, and load it with the next request, in silence."""
    monkeypatch.setattr(remote_host, "KEPT_FOR", 0.0)
    patience = Timeouts(start=60.0, progress=0.1)
    async with scene(timeouts=patience, is_mlx=is_mlx) as s:
        await s.ready()
        lease, exchange = s.ask(f"FAKE head-delay={30 if is_mlx else 0.4} n=1")
        if is_mlx:
            with pytest.raises(ExchangeError):
                await exchange.start()
        else:
            assert (await exchange.start()).status == 200
        exchange.close()
        lease.release()
        assert s.backend.snapshot().restarts == 0 or is_mlx
