"""Servers that are given by their url: reached, lost, reached again, and what their requests are told meanwhile."""

import asyncio
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from backends.admission.lease import Lease
from backends.domain.cadence import Cadence
from backends.domain.failure import Aftermath, Cause, Failure, Sent
from backends.domain.spec import BackendSpec, Remote, Timeouts
from backends.domain.state import State
from backends.process import ports
from backends.replica import probe
from backends.replica.events import Drain, OperatorCommand, Restart, Start, Stop
from backends.replica.remote import RemoteReplica
from backends.upstream.exchange import Exchange, ExchangeError, Fault, Request
from gateway.api.error_mapping import CODES
from tests.faultserver import SSE_HEAD, Conn, FaultServer
from tests.lives import FAKE, HURRIED, MODEL, TOKEN, engine, runtime, until

pytestmark = pytest.mark.usefixtures("nothing_left")


def http(status: int, body: bytes = b"{}") -> bytes:
    return b"HTTP/1.0 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def error(status: int, code: str) -> bytes:
    return http(status, json.dumps({"error": {"message": f"it said {code}", "code": code}}).encode())


TOUCHY = replace(HURRIED, abandoned_after=0.05)
WELL = http(200)
ANSWER = http(200, TOKEN)


class Upstream:
    """What it says can be changed at any moment; None = nothing at all. ``asked`` are the paths."""

    def __init__(self) -> None:
        self.health: bytes | None = WELL
        self.completion: bytes | None = ANSWER
        self.models: bytes | None = http(404, b"Not Found")
        self.hang_up = False  # at once, without reading
        self.asked: list[str] = []
        self.heads: list[bytes] = []

    async def __call__(self, conn: Conn) -> None:
        if self.hang_up:
            conn.rst()
            return
        request = await conn.request()
        path = request.split(b" ")[1].decode()
        self.asked.append(path)
        self.heads.append(request)
        told = {"/health": self.health, "/v1/models": self.models}.get(path, self.completion)
        if told is not None:
            await conn.send(told)
        if told is None or told == SSE_HEAD:
            await conn.gone()
        conn.fin()


class Scene:
    def __init__(
        self,
        port: int,
        *,
        progress: float = 60.0,
        start: float = 60.0,
        is_mlx: bool = False,
        api_key: str = "",
        cadence: Cadence = HURRIED,
    ) -> None:
        remote = Remote(f"http://127.0.0.1:{port}", api_key)
        kind, patience = engine(is_mlx=is_mlx), Timeouts(start=start, progress=progress)
        spec = BackendSpec("far:0", "far", 0, MODEL, remote, kind, 2, patience, codes=CODES)
        self.runtime = runtime(cadence=cadence)
        self.backend = RemoteReplica(spec, remote, self.runtime)

    @property
    def failure(self) -> Failure:
        failure = self.backend.snapshot().last_failure
        assert failure is not None
        return failure

    async def state(self, state: State, generation: int | None = None) -> None:
        def reached() -> bool:
            return self.backend.state is state and generation in (None, self.backend.snapshot().generation)

        await until(reached, f"{state} in generation {generation}")

    async def ready(self) -> None:
        assert self.backend.command(Start()) is None
        await self.state(State.READY)

    async def ask(self) -> tuple[Lease, Exchange]:
        lease = self.backend.admit()
        exchange = lease.open(Request("POST", "/v1/completions", b"{}"))
        await exchange.start()
        return lease, exchange


@asynccontextmanager
async def scene(
    upstream: Upstream,
    *,
    progress: float = 60.0,
    start: float = 60.0,
    is_mlx: bool = False,
    api_key: str = "",
    cadence: Cadence = HURRIED,
) -> AsyncIterator[Scene]:
    async with FaultServer(upstream) as server:
        one = Scene(server.port, progress=progress, start=start, is_mlx=is_mlx, api_key=api_key, cadence=cadence)
        try:
            yield one
        finally:
            await one.backend.close()
        assert (one.backend.state, one.backend.inflight, len(one.backend._tasks)) == (State.STOPPED, 0, 0)


# -- reached -----------------------------------------------------------------------------------------------------------


async def test_reached_is_one_token() -> None:
    upstream = Upstream()
    async with scene(upstream, api_key="secret") as s:
        before = s.backend.snapshot()
        assert (before.state, before.eta, s.backend.is_up_or_starting, s.backend.has_slot()) == (
            State.STOPPED,
            None,
            False,
            False,
        )
        await s.ready()
        now = s.backend.snapshot()
        assert (now.state, now.pid, now.generation, now.restarts, now.eta) == (State.READY, None, 1, 0, 0.0)
        assert now.url == s.backend.spec.target.url  # type: ignore[union-attr]
        assert (s.backend.responsive, s.backend.is_up_or_starting, s.backend.has_slot()) == (True, True, True)
        assert "/v1/chat/completions" in upstream.asked
        await until(lambda: upstream.asked.count("/health") > 2)
        assert all(b"Bearer secret" in head for head in upstream.heads)


async def test_a_gateway_that_restarts_its_model_is_kept_and_asked_last() -> None:
    """Requests for it wait there."""
    upstream = Upstream()
    async with scene(upstream) as s:
        await s.ready()
        for status, responsive in (("loading", False), ("ok", True), ("loading", False), ("degraded", True)):
            upstream.health = http(200, json.dumps({"models": {MODEL: {"status": status}}}).encode())
            await until(lambda responsive=responsive: s.backend.responsive is responsive)  # type: ignore[misc]
            now = s.backend.snapshot()
            assert (now.state, now.restarts, now.recovers, s.backend.has_slot()) == (State.READY, 0, True, True)
            assert (now.loading is None, now.eta == 0.0, now.eta_known) == (responsive,) * 3
            asked = upstream.asked.count("/health")
            await until(lambda asked=asked: upstream.asked.count("/health") > asked + 10)  # type: ignore[misc]
            assert s.backend.state is State.READY, "however often it says so"


async def test_slots() -> None:
    upstream = Upstream()
    async with scene(upstream) as s:
        await s.ready()
        leases = [s.backend.admit() for _ in range(2)]
        assert (s.backend.has_slot(), s.backend.inflight, s.backend.snapshot().inflight) == (False, 2, 2)
        for lease in leases:
            lease.release()
        assert s.backend.has_slot()


@pytest.mark.parametrize("command", [Stop(), Restart(), Drain()], ids=lambda c: type(c).__name__)
async def test_it_is_not_ours_to_stop(command: OperatorCommand) -> None:
    upstream = Upstream()
    async with scene(upstream) as s:
        await s.ready()
        assert "the gateway cannot stop it" in str(s.backend.command(command))
        assert s.backend.command(Start()) == "it is ready already"
        s.backend.kill()
        assert s.backend.state is State.READY


async def test_closed_before_it_was_started() -> None:
    async with scene(Upstream()):
        pass


# -- not reached -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "cause", "words"),
    [
        (error(401, "invalid_api_key"), Cause.UNREACHABLE, "it said invalid_api_key"),
        (error(404, "model_not_found"), Cause.MODEL_NOT_FOUND, "it said model_not_found"),
        (error(503, "insufficient_memory"), Cause.OOM, "it said insufficient_memory"),
        (error(503, "model_loading"), Cause.UNREACHABLE, "it said model_loading"),
        (error(503, "backend_wedged"), Cause.WEDGE, "it said backend_wedged"),
        (http(401, b"go away"), Cause.UNREACHABLE, "go away"),
        (http(404, b"no such model"), Cause.MODEL_NOT_FOUND, "no such model"),
        (http(400, b"no"), Cause.UNREACHABLE, "answers a first request with an error: no"),
        (http(500, b"no"), Cause.UNREACHABLE, "answers a first request with an error: no"),
        (http(200, b"<html>"), Cause.UNREACHABLE, "without a completion"),
    ],
)
async def test_one_that_answers_with_an_error_is_not_reached(completion: bytes, cause: Cause, words: str) -> None:
    upstream = Upstream()
    upstream.completion = completion
    async with scene(upstream) as s:
        s.backend.command(Start())
        await s.state(State.UNREACHABLE)
        assert (s.failure.cause, s.failure.aftermath, s.failure.backend) == (cause, Aftermath.UNKNOWN, "far:0")
        assert words in s.failure.message
        assert (s.backend.is_up_or_starting, s.backend.has_slot()) == (False, False)
        now = s.backend.snapshot()
        assert (now.restarts, now.eta is None, now.last_failure_at is None) == (0, False, False)


async def test_nobody_there_and_then_somebody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="backends.replica.remote")
    upstream = Upstream()
    upstream.hang_up = True
    async with scene(upstream) as s:
        s.backend.command(Start())
        await s.state(State.UNREACHABLE)
        assert (s.failure.cause, s.backend.responsive) == (Cause.UNREACHABLE, False)
        assert "cannot be reached" in s.failure.message
        upstream.hang_up = False
        await s.state(State.READY)
        assert s.backend.snapshot().restarts == 0, "it was never lost"
    states = [(r.__dict__["state"], r.levelno) for r in caplog.records]
    assert states == [
        ("starting", logging.INFO),
        ("unreachable", logging.WARNING),
        ("ready", logging.INFO),
        ("stopped", logging.INFO),
    ]
    assert caplog.records[1].__dict__["cause"] == "unreachable"


# -- listed: reached, and nothing is asked of the model ----------------------------------------------------------------


def listing(*names: str, **more: object) -> bytes:
    return http(200, json.dumps({"object": "list", "data": [{"id": name, **more} for name in names]}).encode())


@pytest.mark.parametrize(
    "models", [listing("other", MODEL), listing(f"{MODEL}:latest"), listing("other", aliases=["x", MODEL])]
)
async def test_a_listed_model_is_reached_and_not_loaded(models: bytes) -> None:
    upstream = Upstream()
    upstream.models = models
    async with scene(upstream, api_key="secret") as s:
        await s.ready()
        await until(lambda: upstream.asked.count("/health") > 3)
        assert set(upstream.asked) == {"/health", "/v1/models"}
        assert all(b"Bearer secret" in head for head in upstream.heads)


async def test_a_list_without_the_model_is_told_if_the_model_is_not_known() -> None:
    upstream = Upstream()
    upstream.models = listing("a", "b", "c", "d", "e", "f")
    upstream.completion = error(404, "model_not_found")
    async with scene(upstream) as s:
        s.backend.command(Start())
        await s.state(State.UNREACHABLE)
        assert s.failure.cause is Cause.MODEL_NOT_FOUND
        assert "it lists: a, b, c, d, e and 1 more; set model: to one of them" in s.failure.message
        upstream.completion = ANSWER  # some servers know more names than they list
        await s.state(State.READY)


async def test_a_raw_server_that_was_started_without_a_model_is_told_what_to_set() -> None:
    upstream = Upstream()
    upstream.models = listing("org/a")
    upstream.completion = http(404, b'{"error": "expected str, bytes or os.PathLike object, not NoneType"}')
    async with scene(upstream, is_mlx=True) as s:
        s.backend.command(Start())
        await s.state(State.UNREACHABLE)
        assert "not NoneType (it lists: org/a; set model: to one of them)" in s.failure.message


@pytest.mark.parametrize("status", [401, 403])
async def test_a_list_that_is_not_for_our_key_leaves_it_to_the_token(status: int) -> None:
    upstream = Upstream()
    upstream.models = upstream.completion = http(status, b'{"error": "unauthorized"}')
    async with scene(upstream) as s:
        s.backend.command(Start())
        await s.state(State.UNREACHABLE)
        assert (s.failure.cause, "unauthorized" in s.failure.message) == (Cause.UNREACHABLE, True)
        upstream.completion = ANSWER
        await s.state(State.READY)


async def test_one_that_gives_no_list_while_it_is_busy_is_asked_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with one thread, say."""
    monkeypatch.setattr(probe, "LIST_TIMEOUT", 0.05)
    upstream = Upstream()
    upstream.models = None
    async with scene(upstream) as s:
        await s.ready()
        assert "/v1/chat/completions" in upstream.asked


async def test_one_that_generates_nothing_has_to_give_a_token_though_it_lists_the_model() -> None:
    upstream = Upstream()
    upstream.models = listing(MODEL)
    async with scene(upstream, progress=0.2, start=0.2) as s:
        await s.ready()
        upstream.completion = SSE_HEAD
        lease, exchange = await s.ask()
        with pytest.raises(ExchangeError):
            await exchange.read()
        exchange.close()
        lease.release()
        await s.state(State.UNREACHABLE)
        upstream.asked.clear()
        await until(lambda: upstream.asked.count("/v1/models") > 1)
        assert s.backend.state is State.UNREACHABLE
        upstream.completion = ANSWER
        await s.state(State.READY)


async def test_one_that_was_switched_off_is_reached_again_by_its_list() -> None:
    upstream = Upstream()
    upstream.models = listing(MODEL)
    async with scene(upstream, progress=0.2) as s:
        await s.ready()
        upstream.hang_up = True
        await s.state(State.UNREACHABLE)
        upstream.hang_up = False
        await s.state(State.READY, generation=2)
        assert "/v1/chat/completions" not in upstream.asked


# -- lost --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_mlx", [True, False])
async def test_lost_by_503_and_reached_again(is_mlx: bool) -> None:
    upstream = Upstream()
    async with scene(upstream, is_mlx=is_mlx) as s:
        await s.ready()
        upstream.health = upstream.completion = http(503)
        await s.state(State.UNREACHABLE)
        assert s.backend.snapshot().restarts == 1
        upstream.health, upstream.completion = WELL, ANSWER
        await s.state(State.READY, generation=2)


async def test_lost_by_silence() -> None:
    upstream = Upstream()
    async with scene(upstream, progress=0.3, cadence=replace(HURRIED, health_timeout=0.05)) as s:
        await s.ready()
        upstream.health = upstream.completion = None
        await s.state(State.UNREACHABLE)
        assert s.failure.cause is Cause.STALLED
        assert "is marked unreachable: it has not answered /health" in s.failure.message


async def test_requests_in_flight_on_one_that_is_lost() -> None:
    upstream = Upstream()
    async with scene(upstream, is_mlx=True) as s:
        await s.ready()
        upstream.completion = SSE_HEAD
        calls = [await s.ask() for _ in range(2)]
        upstream.health = http(503)
        for lease, exchange in calls:
            with pytest.raises(ExchangeError) as caught:
                await exchange.read()
            failure = await lease.diagnose(caught.value)
            assert (failure.verdict.cause, failure.alone, failure.sent) == (Cause.UNREACHABLE, False, Sent.MAYBE)
            exchange.close()
            lease.release()


async def test_one_that_alone_is_stuck_is_ended_and_a_token_asked_for() -> None:
    upstream = Upstream()
    async with scene(upstream, progress=0.2) as s:
        await s.ready()
        upstream.completion = SSE_HEAD
        stuck, exchange = await s.ask()
        upstream.completion = ANSWER
        before = len(upstream.asked) - upstream.asked.count("/health")
        with pytest.raises(ExchangeError) as caught:
            await exchange.read()
        assert caught.value.fault in (Fault.STALLED, Fault.DIED)
        failure = await stuck.diagnose(caught.value)
        assert failure.verdict.cause is Cause.STALLED
        assert not failure.truncated
        exchange.close()
        stuck.release()
        await until(lambda: len(upstream.asked) - upstream.asked.count("/health") > before)
        await s.state(State.READY)


@pytest.mark.parametrize("completion", [ANSWER, http(500)], ids=["well", "broken"])
async def test_a_client_that_waited_in_vain_and_left_makes_us_look(completion: bytes) -> None:
    upstream = Upstream()
    async with scene(upstream, cadence=TOUCHY) as s:
        await s.ready()
        upstream.completion = SSE_HEAD
        lease, exchange = await s.ask()
        reading = asyncio.ensure_future(exchange.read())
        await until(lambda: lease.silence(s.runtime.clock()) >= TOUCHY.abandoned_after)
        upstream.completion = completion
        lease.release()
        exchange.close()
        await asyncio.wait({reading})
        assert isinstance(reading.exception(), ExchangeError)
        if completion is ANSWER:
            await until(lambda: upstream.asked.count("/v1/chat/completions") == 2)
            await until(lambda: not s.backend._period.monitor.suspected)
            assert (s.backend.state, s.backend.snapshot().generation) == (State.READY, 1)
        else:
            await s.state(State.UNREACHABLE)
            await until(lambda: "answers a first request with an error" in s.failure.message)


# -- one call that broke -----------------------------------------------------------------------------------------------


async def test_an_answer_that_ends_early_on_one_that_is_well() -> None:
    upstream = Upstream()
    async with scene(upstream) as s:
        await s.ready()
        lease, exchange = await s.ask()
        failure = await lease.diagnose(ExchangeError(Fault.INCOMPLETE, "ended early"))
        assert (failure.verdict.cause, failure.truncated, failure.verdict.aftermath) == (
            Cause.NONE,
            True,
            Aftermath.ALIVE,
        )
        exchange.close()
        lease.release()


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.RESET])
async def test_a_call_that_broke_on_one_that_cannot_be_reached(fault: Fault) -> None:
    upstream = Upstream()
    async with scene(upstream) as s:
        await s.ready()
        lease, exchange = await s.ask()
        upstream.hang_up = True
        failure = await lease.diagnose(ExchangeError(fault, "it broke"))
        assert failure.verdict.cause is Cause.UNREACHABLE
        assert (failure.sent is Sent.NOTHING) == (fault is Fault.REFUSED)
        assert (failure.truncated, failure.verdict.aftermath) == (False, Aftermath.UNKNOWN)
        exchange.close()
        lease.release()


# -- a real process ----------------------------------------------------------------------------------------------------


async def launch(port: int) -> asyncio.subprocess.Process:
    argv = [str(FAKE), "--port", str(port), "--model", MODEL]
    quiet = asyncio.subprocess.DEVNULL
    return await asyncio.create_subprocess_exec(sys.executable, *argv, stderr=quiet)


async def test_a_server_that_is_killed_and_started_again() -> None:
    port = ports.free_port("127.0.0.1")
    one = Scene(port, is_mlx=True)
    process = await launch(port)
    try:
        await one.ready()
        process.kill()
        assert await process.wait() == -signal.SIGKILL
        await one.state(State.UNREACHABLE)
        assert "cannot be reached" in one.failure.message or "no longer listens" in one.failure.message
        process = await launch(port)
        await one.state(State.READY, generation=2)
        assert one.backend.snapshot().restarts == 1
    finally:
        await one.backend.close()
        process.kill()
        await process.wait()
