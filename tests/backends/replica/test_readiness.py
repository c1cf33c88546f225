"""From an open port to a proven token: every way there, and every way to fall short of it."""

import asyncio
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest

from backends.domain.cadence import Cadence
from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.report import EngineReport
from backends.domain.spec import BackendSpec, Launch, Timeouts
from backends.domain.state import State
from backends.process import ports
from backends.replica.events import Start
from backends.replica.readiness import Readiness
from backends.upstream.exchange import ExchangeError, Fault, Request
from tests.lives import HURRIED, MODEL, TOKEN, Scripted, Told, engine, instance, refused, until
from tests.stage import LONG, QUICK, scene

pytestmark = pytest.mark.usefixtures("nothing_left")

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
DIED = (
    "2026-11-22 17:30:00,000 - ERROR - mlx_lm.server generation thread died: Missing 1 parameters: \nmodel.norm.weight."
)
IN_USE = "OSError: [Errno 98] Address already in use"
BUSY: Told = (503, b'{"status": "unavailable"}')


@pytest.fixture
def port() -> Iterator[int]:
    """Where this process listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@dataclass
class Launching:
    """A start that goes as its script says. ``health`` and ``answers`` are used up; their last one stays."""

    port: int
    health: list[Told]
    answers: list[Told]
    lines: Sequence[str] = ()
    is_mlx: bool = True
    within: float = 60.0
    pid: int = os.getpid()

    cadence: Cadence = HURRIED

    def __post_init__(self) -> None:
        self.dialer = Scripted(self.script)
        kind, patience = engine(is_mlx=self.is_mlx), Timeouts(start=self.within)
        self.spec = BackendSpec("m:0", "m", 0, MODEL, Launch(()), kind, timeouts=patience)
        self.instance = instance(self.dialer, self.spec, port=self.port, pid=self.pid)
        for line in self.lines:
            self.instance.log.feed(line)

    def script(self, request: Request) -> Told:
        left = self.health if request.path == "/health" else self.answers
        return left.pop(0) if len(left) > 1 else left[0]

    async def prove(self) -> Failure | None:
        clock = asyncio.get_running_loop().time
        return await Readiness(self.instance, self.spec, clock=clock, cadence=self.cadence).prove()

    async def failure(self) -> Failure:
        failure = await self.prove()
        assert failure is not None
        assert failure.message.startswith("m:0 did not start: ")
        assert failure.aftermath is Aftermath.WEDGED
        return failure


OK: list[Told] = [(200, b"{}")]
ONE: list[Told] = [(200, TOKEN)]


# -- ready -------------------------------------------------------------------------------------------------------------


async def test_a_listener_of_ours_and_one_token(port: int) -> None:
    start = Launching(port, OK, ONE)
    assert await start.prove() is None
    assert start.dialer.asked == ["/health", CHAT]


@pytest.mark.parametrize(("lines", "cause"), [((), Cause.WEDGE), ((DIED,), Cause.LOAD_FAILURE)])
async def test_a_generation_thread_that_has_ended_never_makes_a_token(
    port: int, lines: tuple[str, ...], cause: Cause
) -> None:
    """mlx-lm 0.31.3 answers /health with 200 for ever, and a first request never."""
    start = Launching(port, OK, [None], lines=lines)
    start.instance.monitor.note_report(EngineReport(active=1, pooled=0, peak=1, generating=False))
    assert (await start.failure()).cause is cause


async def test_a_port_that_opens_late(port: int) -> None:
    start = Launching(port, [refused(), refused(), *OK], ONE)
    assert await start.prove() is None
    assert start.dialer.asked == ["/health"] * 3 + [CHAT]


@pytest.mark.parametrize("status", [404, 503], ids=str)
async def test_a_server_without_health_counts_by_its_token(port: int, status: int) -> None:
    assert await Launching(port, [(status, b"")], ONE, is_mlx=False).prove() is None


async def test_a_server_without_chat_is_asked_for_plain_text(port: int) -> None:
    start = Launching(port, OK, [(404, b'{"error": "Not Found"}'), *ONE])
    assert await start.prove() is None
    assert start.dialer.asked == ["/health", CHAT, PLAIN]


@pytest.mark.parametrize(
    "not_yet",
    [
        (500, b'{"error": {"message": "warming up"}}'),
        (503, b'{"error": {"message": "loading", "code": "model_loading"}}'),
        (200, b"<html>a proxy</html>"),
        ExchangeError(Fault.RESET, "reset"),
        ExchangeError(Fault.EOF_BEFORE_HEAD, "closed"),
    ],
    ids=str,
)
async def test_an_answer_that_only_says_not_yet_is_asked_again(port: int, not_yet: Told) -> None:
    start = Launching(port, OK, [not_yet, not_yet, *ONE], is_mlx=False)
    assert await start.prove() is None
    assert len(start.dialer.asked) >= 4


# -- not ready ---------------------------------------------------------------------------------------------------------


async def test_a_port_that_somebody_else_holds(port: int) -> None:
    other = await asyncio.create_subprocess_exec("sleep", "60")
    failure = await Launching(port, OK, ONE, pid=other.pid).failure()
    other.kill()
    await other.wait()
    assert (failure.cause, failure.blame) == (Cause.PORT_IN_USE, Blame.MACHINE)
    assert f"port {port} is held by" in failure.message
    assert f"(pid {os.getpid()})" in failure.message


async def test_a_listener_of_which_nothing_can_be_told_is_believed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "listener_is", lambda *_: None)
    assert await Launching(port, OK, ONE, pid=1).prove() is None


async def test_a_shortage_of_descriptors_here_is_no_lost_port(port: int) -> None:
    """``/health`` cannot be asked; the listener that the scan would not find says nothing either."""
    exhausted = ExchangeError(Fault.EXHAUSTED, "no descriptors left")
    assert await Launching(port, [exhausted, exhausted, *OK], ONE).prove() is None
    failure = await Launching(ports.free_port("127.0.0.1"), [exhausted], ONE, within=0.05).failure()
    assert failure.cause is Cause.START_TIMEOUT


async def test_sleep_of_the_machine_is_no_time_that_the_start_took(port: int) -> None:
    reset = ExchangeError(Fault.RESET, "reset")
    start = Launching(port, OK, [reset, reset, (200, TOKEN)], within=60.0)
    loop, slept = asyncio.get_running_loop(), 0.0

    def clock() -> float:
        nonlocal slept
        slept = 3600.0 if len(start.answers) < 3 else 0.0  # an hour, once it was asked
        return loop.time() + slept

    assert await Readiness(start.instance, start.spec, clock=clock, cadence=HURRIED).prove() is None
    assert slept


async def test_no_listener_and_the_output_says_that_the_port_was_taken(port: int) -> None:
    failure = await Launching(port, [refused()], ONE, [IN_USE]).failure()
    assert (failure.cause, failure.evidence) == (Cause.PORT_IN_USE, (IN_USE,))


async def test_no_listener_and_the_output_names_another_cause(port: int) -> None:
    hasty = replace(HURRIED, start_hint_silence=0.02)
    failure = await Launching(port, [refused()], ONE, DIED.splitlines(), cadence=hasty).failure()
    assert failure.cause is Cause.LOAD_FAILURE


@pytest.mark.parametrize("health", [refused(), None, (200, b"{}")], ids=["refused", "silent", "ok"])
async def test_nothing_within_the_limit(port: int, health: Told) -> None:
    hasty = replace(HURRIED, health_timeout=0.1)
    failure = await Launching(port, [health], [None], within=0.05, cadence=hasty).failure()
    assert failure.cause is Cause.START_TIMEOUT
    assert "within 0.05 s (timeouts.start)" in failure.message


async def test_what_the_output_names_is_better_than_a_timeout(port: int) -> None:
    failure = await Launching(port, [refused()], [None], DIED.splitlines(), within=0.05).failure()
    assert failure.cause is Cause.LOAD_FAILURE


@pytest.mark.parametrize(("lines", "cause"), [(DIED.splitlines(), Cause.LOAD_FAILURE), ([], Cause.WEDGE)])
async def test_health_that_turns_to_503_before_a_token(port: int, lines: list[str], cause: Cause) -> None:
    start = Launching(port, [*OK, BUSY], [None], lines)
    assert (await start.failure()).cause is cause
    assert start.dialer.asked == ["/health", CHAT, "/health"]


async def test_health_that_stays_well_while_the_output_names_a_cause(port: int) -> None:
    """mlx-lm 0.31.3: a load that failed leaves a server that says 200 and never answers."""
    hasty = replace(HURRIED, start_hint_silence=0.0)
    assert (await Launching(port, OK, [None], DIED.splitlines(), cadence=hasty).failure()).cause is Cause.LOAD_FAILURE


@pytest.mark.parametrize(
    ("answer", "lines", "cause"),
    [
        ((404, b'{"error": "No chat template"}'), [], Cause.LOAD_FAILURE),
        ((404, b'{"error": "Repository Not Found for url: https://huggingface.co/x"}'), [], Cause.MODEL_NOT_FOUND),
        ((404, b'{"error": "generation thread died"}'), [], Cause.WEDGE),
        ((404, b'{"error": "generation thread died"}'), DIED.splitlines(), Cause.LOAD_FAILURE),
    ],
)
async def test_a_first_answer_that_is_an_error(port: int, answer: Told, lines: list[str], cause: Cause) -> None:
    failure = await Launching(port, OK, [answer], lines).failure()
    assert failure.cause is cause
    assert lines or "its first answer was an error: " in failure.message


async def test_one_that_exits_meanwhile_is_asked_no_more(port: int) -> None:
    start = Launching(port, OK, [None])
    proving = asyncio.ensure_future(start.prove())
    await until(lambda: CHAT in start.dialer.asked)
    proving.cancel()
    await asyncio.wait({proving})
    assert proving.cancelled()
    await until(lambda: all(exchange.closed for exchange in start.dialer.opened))


# -- with processes ----------------------------------------------------------------------------------------------------


async def test_a_load_that_takes_its_time() -> None:
    async with scene("load=slow load-time=0.3") as s:
        await s.ready()
        assert s.backend.snapshot().generation == 1


async def test_a_load_that_fails_and_tells_nobody() -> None:
    once = replace(QUICK, max_failures=1)
    async with scene("load-hang", restart=once, cadence=replace(HURRIED, start_hint_silence=0.1)) as s:
        s.backend.command(Start())
        await s.state(State.FAILED)
        assert s.failure.cause is Cause.LOAD_FAILURE


async def test_a_bind_that_fails_and_leaves_the_process_alive() -> None:
    async with scene("bind-failure") as s:
        s.backend.command(Start())
        await until(lambda: s.backend.snapshot().last_failure)
        assert (s.failure.cause, s.failure.aftermath) == (Cause.PORT_IN_USE, Aftermath.WEDGED)


async def test_a_load_that_never_ends() -> None:
    async with scene("load=slow load-time=60", timeouts=Timeouts(start=0.5, stop=LONG.stop)) as s:
        s.backend.command(Start())
        await until(lambda: s.backend.snapshot().last_failure)
        assert s.failure.cause is Cause.START_TIMEOUT
