"""Error answers of a backend, read within bounds; and what the failure of an attempt teaches."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from backends.diagnosis.suspects import RequestProgress
from backends.domain.failure import NO_CODES, Aftermath, Blame, CallFailure, Cause, Failure, Reason
from backends.domain.snapshot import Seat
from backends.upstream.exchange import Request
from backends.upstream.h1_client import H1Dialer
from gateway.api.kinds import Kind
from gateway.forward import attempt
from gateway.forward.attempt import Attempts
from gateway.forward.request_state import Progress
from gateway.forward.token_counter import Count
from gateway.policy.context_limit import Size
from gateway.policy.request_guard import RequestGuard
from tests.faultserver import Conn, FaultServer


async def drips(conn: Conn) -> None:
    await conn.request()
    await conn.send(b'HTTP/1.1 400 Bad Request\r\ncontent-length: 100000\r\n\r\n{"error": "no such field"')
    while True:
        await conn.send(b" ")
        await asyncio.sleep(0.01)


async def test_an_error_body_that_drips_has_a_bound_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "ERROR_BODY_WAIT", 0.1)
    identity = SimpleNamespace(note_answer=lambda *_: None, is_mlx=False)
    secrets = SimpleNamespace(hide=str)
    lease: Any = SimpleNamespace(
        identity=identity, spec=SimpleNamespace(id="far:0", codes=NO_CODES, secrets=secrets), generation=1
    )
    attempts = Attempts({}, SimpleNamespace(), SimpleNamespace(), asyncio.get_running_loop().time)  # type: ignore[arg-type]
    async with FaultServer(drips) as server, asyncio.timeout(10):
        exchange = H1Dialer("127.0.0.1", server.port, jitter=lambda: 0.5).open(Request("POST", "/"))
        try:
            failure = await attempts.refusal(lease, exchange, await exchange.start())
        finally:
            exchange.close()
    assert "no such field" in failure.verdict.message
    assert "400" in failure.verdict.message


def _sent(size: Size) -> tuple[Any, Any]:
    """A lease, and the state of the request that was sent over it."""
    lease = SimpleNamespace(seat=Seat("m:0", 1), spec=SimpleNamespace(model="m"), progress=RequestProgress(tokens=1500))
    state = SimpleNamespace(
        progress=Progress(),
        parsed=SimpleNamespace(prompt_chars=8000, kind=Kind.CHAT, params={}),
        sizes={"m": size},
        best_size=lambda _model: size,
        model="m",
        fingerprint=lambda: b"x",
        keep_reported=lambda: None,
        progress_now=lambda: RequestProgress(tokens=2000, counted=True),
    )
    return lease, state


@pytest.mark.parametrize(("chars", "tokens"), [(None, 2000), (6000, 1500)])
async def test_what_ran_out_of_memory_is_as_large_as_what_was_sent(chars: int | None, tokens: int) -> None:
    """Of a prompt that is read in slices a beginning."""
    guard = RequestGuard({"m": None})
    guard.answered(lambda: b"", 400, 100, by="m")  # type: ignore[arg-type]
    verdict = Failure(Cause.OOM, Aftermath.EXITED, "out of memory", Blame.BACKEND, "m:0")
    failure = CallFailure(verdict, suspect=True, alone=True)
    lease, state = _sent(Size(2000, 8000, exact=True))

    async def at_once(_parsed: object, work: Any) -> Any:
        return work()

    attempts = Attempts({}, guard, SimpleNamespace(work_on=at_once), asyncio.get_running_loop().time)  # type: ignore[arg-type]
    await attempts.failed(state, lease, failure, chars=chars)
    known = guard.contexts["m"].ceiling(0.0)
    assert known is not None
    assert known["tokens"] == tokens
    shorter = guard.contexts["m"].refusal(Size(1400, 5600), asyncio.get_running_loop().time())
    assert shorter is None


async def test_what_was_stopped_for_its_size_is_counted_before_it_is_admitted_again() -> None:
    """An estimate may be far too small: it would be stopped again."""
    verdict = Failure(Cause.OOM, Aftermath.ALIVE, "no room", Blame.GATEWAY, "m:0", reason=Reason.NO_ROOM)

    async def count(*_: object) -> Count:
        return Count(7000, exact=True)

    rules: Any = {"m": SimpleNamespace(counter=SimpleNamespace(count=count))}
    attempts = Attempts(rules, RequestGuard({"m": None}), SimpleNamespace(), asyncio.get_running_loop().time)  # type: ignore[arg-type]
    lease, state = _sent(Size(2000, 8000, exact=False))
    await attempts.failed(state, lease, CallFailure(verdict))
    assert state.sizes["m"] == Size(7000, 8000, exact=True)
