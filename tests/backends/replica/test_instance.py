"""One life: what its end, its condemnation and a broken call are taken to mean."""

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest

from backends.admission.lease import Lease
from backends.diagnosis.suspects import RequestProgress
from backends.domain.failure import Aftermath, Blame, Cause, Failure, Sent
from backends.domain.state import Health
from backends.process.child import ChildProcess
from backends.replica import instance as life_module
from backends.replica.instance import WINDOW, Instance
from backends.replica.liveness import Condemn
from backends.upstream.exchange import ExchangeError, Fault
from tests.lives import Scripted, refused, scripted

METAL = "[METAL] Command buffer execution failed: "
OOM = f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
DIED = f"2026-11-22 17:30:00,000 - ERROR - mlx_lm.server generation thread died: {OOM}"
CUT = ExchangeError(Fault.INCOMPLETE, "the stream ended early")
STALLED = ExchangeError(Fault.STALLED, "no progress for 6 s")
KILLED = Failure(Cause.KILLED, Aftermath.EXITED, "a:0 died: it was killed", exit=-9)
ME, *OTHERS = (cast("Lease", object()) for _ in range(9))


def crowd_of(count: int) -> dict[Lease, RequestProgress]:
    """As many in flight, all with the same prompt and no token yet."""
    return dict.fromkeys([ME, *OTHERS][:count], RequestProgress(tokens=10))


def life(dialer: Scripted | None = None, *lines: str, **more: Any) -> Instance:
    condemned: list[Failure] = []
    one = Instance(
        "a:0",
        3,
        True,
        8081,
        cast("ChildProcess", None),
        dialer or scripted(),
        condemned.append,
        lambda: None,
        **more,
    )
    for line in lines:
        one.log.feed(line)
    return one


# -- what it says ------------------------------------------------------------------------------------------------------


def test_a_cause_that_was_named_long_ago_is_forgotten() -> None:
    one = life(None, OOM, *["all is well"] * WINDOW)
    assert one.named_cause() is None
    assert one.of_exit(-6).cause is Cause.NATIVE_CRASH


def test_health_is_counted_and_an_answer_is_remembered() -> None:
    one = life()
    for n, (health, same, answered) in enumerate(
        [
            (Health.OK, 1, 1.0),
            (Health.OK, 2, 2.0),
            (Health.SILENT, 1, 2.0),
            (Health.REFUSED, 1, 2.0),
            (Health.UNAVAILABLE, 1, 5.0),
        ],
        start=1,
    ):
        one.note_health(health, float(n))
        assert (one.health, one.same_health, one.answered) == (health, same, answered)


def test_the_first_verdict_stands() -> None:
    one = life()
    one.set_verdict(KILLED, crowd_of(4))
    one.set_verdict(Failure(Cause.NONE, Aftermath.EXITED, "a consequence"), {})
    assert (one.verdict, one.inflight_at_failure, one.settled.is_set()) == (KILLED, 4, True)


# -- its end -----------------------------------------------------------------------------------------------------------


def test_our_own_stop_is_nobodys_failure() -> None:
    failure = life(None, OOM, asked_to_stop=True).of_exit(-15)
    assert (failure.cause, failure.blame, failure.exit) == (Cause.NONE, Blame.GATEWAY, -15)
    assert (failure.backend, failure.generation) == ("a:0", 3)


@pytest.mark.parametrize(
    ("returncode", "lines", "more", "cause"),
    [
        (-6, [OOM], {}, Cause.OOM),
        (-9, [], {}, Cause.KILLED),
        (-9, [], {"memory_short": True}, Cause.OOM),
        (-11, [], {}, Cause.NATIVE_CRASH),
        (-11, ['  File "x/mlx_lm/generate.py", line 9 in step'], {"memory_limited": True}, Cause.OOM),
        (1, ["Traceback (most recent call last):", "ValueError: no"], {}, Cause.LOAD_FAILURE),
        (0, [], {}, Cause.NATIVE_CRASH),
        (-15, ["some line"], {}, Cause.KILLED),
        (-2, [], {}, Cause.KILLED),
        (3, [], {}, Cause.NATIVE_CRASH),
    ],
)
def test_what_an_exit_means(returncode: int, lines: list[str], more: dict[str, Any], cause: Cause) -> None:
    failure = life(None, *lines, **more).of_exit(returncode)
    assert (failure.cause, failure.aftermath, failure.exit) == (cause, Aftermath.EXITED, returncode)
    assert failure.message.startswith("a:0 died: ")
    assert (failure.backend, failure.generation) == ("a:0", 3)


def test_an_end_that_nobody_asked_for_says_so() -> None:
    assert "exited with status 0 though nobody had stopped it" in life().of_exit(0).message
    assert "exited by itself with status 3" in life().of_exit(3).message
    assert "ended from outside (SIGTERM)" in life().of_exit(-15).message


def test_the_output_explains_a_condemnation_only_where_it_names_the_same() -> None:
    one = life(None, DIED, health=Health.UNAVAILABLE)
    same = one.of_condemned(Condemn(Cause.OOM, "its generation thread is dead"))
    assert (same.cause, same.aftermath, same.evidence) == (Cause.OOM, Aftermath.WEDGED, (DIED.split(" - ")[2],))
    assert same.message.startswith("a:0 is being replaced: its generation thread is dead (")
    other = one.of_condemned(Condemn(Cause.STALLED, "it made no progress"))
    assert (other.cause, other.blame, other.evidence) == (Cause.STALLED, Blame.BACKEND, ())
    assert other.message == "a:0 is being replaced: it made no progress"


@pytest.mark.parametrize(("line", "cause"), [(DIED, Cause.OOM), ("all is well", None)])
def test_what_its_output_names_since_it_was_ready(line: str, cause: Cause | None) -> None:
    one = life(None, OOM)
    one.ready_at = one.log.position
    one.log.feed(line)
    assert one.named_cause() is cause


# -- one call ----------------------------------------------------------------------------------------------------------


def test_a_call_that_breaks_off_on_a_living_process() -> None:
    failure = life().of_call(CUT, ME)
    assert (failure.cause, failure.aftermath, failure.truncated) == (Cause.NONE, Aftermath.ALIVE, True)
    assert (failure.sent, failure.suspect, failure.backend) == (Sent.MAYBE, False, "a:0")


def test_a_call_that_alone_is_stuck_is_stalled_and_not_truncated() -> None:
    failure = life().of_call(STALLED, ME)
    assert (failure.cause, failure.aftermath, failure.truncated) == (Cause.STALLED, Aftermath.ALIVE, False)
    assert "no progress for 6 s" in failure.message


@pytest.mark.parametrize("inflight_at_failure", [0, 1, 5])
def test_what_ended_the_process_ended_its_calls(inflight_at_failure: int) -> None:
    one = life()
    one.set_verdict(KILLED, crowd_of(inflight_at_failure))
    failure = one.of_call(refused(), ME)
    assert (failure.cause, failure.exit, failure.suspect) == (Cause.KILLED, -9, False)
    assert failure.sent is Sent.NOTHING


@pytest.mark.parametrize(("inflight_at_failure", "suspect"), [(1, True), (5, False)])
def test_who_was_alone_is_the_suspect(inflight_at_failure: int, suspect: bool) -> None:
    one = life()
    one.set_verdict(replace(KILLED, cause=Cause.STALLED), crowd_of(inflight_at_failure))
    failure = one.of_call(CUT, ME)
    assert (failure.suspect, failure.alone) == (suspect, suspect)


def test_one_of_several_suspects_was_not_alone() -> None:
    one = life()
    one.set_verdict(replace(KILLED, cause=Cause.NATIVE_CRASH), crowd_of(3))
    failure = one.of_call(CUT, ME)
    assert (failure.suspect, failure.alone) == (True, False)


# -- asking what happened ----------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life_module, "EVIDENCE_WAIT", 0.01)


async def test_where_there_is_a_verdict_nothing_is_asked() -> None:
    dialer = scripted()
    one = life(dialer)
    one.set_verdict(KILLED, crowd_of(2))
    assert (await one.diagnose(CUT, ME)).cause is Cause.KILLED
    assert dialer.asked == []


async def test_an_exit_that_is_seen_a_moment_later_explains_it() -> None:
    one = life(scripted(health=refused()))
    asking = asyncio.ensure_future(one.diagnose(ExchangeError(Fault.RESET, "reset by peer"), ME))
    await asyncio.sleep(0)
    assert not asking.done()
    one.set_verdict(KILLED, crowd_of(1))
    assert (await asking).cause is Cause.KILLED


async def test_a_server_that_answers_has_just_ended_its_answer() -> None:
    dialer = scripted()
    failure = await life(dialer).diagnose(CUT, ME)
    assert (failure.truncated, dialer.asked) == (True, ["/health"])


@pytest.mark.parametrize("health", [refused(), None], ids=["refused", "silent"])
async def test_without_evidence_the_wire_is_believed_after_a_while(
    health: ExchangeError | None, impatient: None
) -> None:
    failure = await life(scripted(health=health)).diagnose(CUT, ME)
    assert (failure.cause, failure.truncated) == (Cause.NONE, True)


async def test_a_refused_call_waits_for_evidence_although_the_server_answers(impatient: None) -> None:
    failure = await life(scripted()).diagnose(refused(), ME)
    assert (failure.sent, failure.cause, failure.truncated) == (Sent.NOTHING, Cause.UNREACHABLE, False)


@pytest.mark.parametrize("is_mlx", [True, False])
async def test_a_dead_generation_thread_is_condemned_at_once(is_mlx: bool, impatient: None) -> None:
    one = life(scripted(health=(503, b"{}")), DIED)
    one.is_mlx = is_mlx
    one.condemn = lambda failure: one.set_verdict(failure, crowd_of(2))
    failure = await one.diagnose(CUT, ME)
    if is_mlx:
        assert (failure.cause, failure.aftermath) == (Cause.OOM, Aftermath.WEDGED)
        assert one.health is Health.UNAVAILABLE
    else:  # there it may just mean "busy"
        assert (failure.cause, one.verdict) == (Cause.NONE, None)


async def test_a_stall_that_the_watch_saw_needs_no_second_opinion() -> None:
    dialer = scripted()
    failure = await life(dialer).diagnose(STALLED, ME)
    assert (failure.cause, dialer.asked) == (Cause.STALLED, [])
