"""What a broken call means: on a process of ours, and on a server of which only the wire tells."""

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from backends.admission.circuit_breaker import against
from backends.admission.lease import Lease
from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.suspects import RequestProgress
from backends.domain.cadence import Cadence
from backends.domain.failure import Aftermath, Blame, Cause, Failure, Reason, Sent
from backends.domain.spec import BackendSpec, Launch
from backends.replica.call_judge import CallJudge
from backends.upstream.exchange import ExchangeError, Fault
from tests.lives import Scripted, refused, scripted

CUT = ExchangeError(Fault.INCOMPLETE, "the stream ended early")
STALLED = ExchangeError(Fault.STALLED, "no progress for 6 s")
EXHAUSTED = ExchangeError(Fault.EXHAUSTED, "no descriptors left")
KILLED = Failure(Cause.KILLED, Aftermath.EXITED, "a:0 died: it was killed", exit=-9)
ME, *OTHERS = (cast("Lease", object()) for _ in range(9))
HASTY = Cadence(evidence_wait=0.01, exit_wait=0.01, ending_wait=0.01)
NEVER = Cadence(evidence_wait=3600.0, exit_wait=3600.0)


def crowd_of(count: int) -> dict[Lease, RequestProgress]:
    """As many in flight, all with the same prompt and no token yet."""
    return dict.fromkeys([ME, *OTHERS][:count], RequestProgress(tokens=10))


class Rechecks:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def judge(dialer: Scripted | None = None, *, process: bool = True, cadence: Cadence = HASTY) -> CallJudge:
    identity = EngineIdentity(BackendSpec("a:0", "a", 0, "m", Launch(())))
    return CallJudge("a:0", 3, dialer or scripted(), identity, has_process=process, cadence=cadence, recheck=Rechecks())


def test_the_first_verdict_stands() -> None:
    one = judge()
    one.set_verdict(KILLED, crowd_of(4))
    one.set_verdict(Failure(Cause.NONE, Aftermath.EXITED, "a consequence"), {})
    assert (one.verdict, one.inflight_at_failure, one.settled.is_set()) == (KILLED, 4, True)


def test_each_call_is_told_how_many_were_in_flight() -> None:
    one = judge()
    one.set_verdict(Failure(Cause.OOM, Aftermath.EXITED, "out of memory"), crowd_of(6))
    failure = one.of_call(CUT, ME)
    assert (failure.suspect, failure.alone, failure.inflight) == (True, False, 6)


@pytest.mark.parametrize(("cause", "alone"), [(Cause.OOM, False), (Cause.NATIVE_CRASH, True)])
def test_who_shared_the_memory_with_others_was_not_alone(cause: Cause, alone: bool) -> None:
    one = judge()
    one.set_verdict(Failure(cause, Aftermath.EXITED, "it died"), crowd_of(1), beside=2)
    failure = one.of_call(CUT, ME)
    assert (failure.suspect, failure.alone, failure.inflight, failure.beside) == (True, alone, 1, 2)


def test_a_call_that_was_moved_from_an_occupied_replica_says_so_and_blames_nobody() -> None:
    failure = judge().of_call(ExchangeError(Fault.OCCUPIED, "whose client has left"), ME)
    verdict = failure.verdict
    assert (verdict.reason, verdict.blame, verdict.aftermath) == (Reason.OCCUPIED, Blame.GATEWAY, Aftermath.ALIVE)
    assert verdict.message == "a:0 works on another request, whose client has left"
    assert not against(failure)


# -- one call ----------------------------------------------------------------------------------------------------------


def test_a_call_that_breaks_off_on_a_living_process() -> None:
    failure = judge().of_call(CUT, ME)
    assert (failure.verdict.cause, failure.verdict.aftermath, failure.truncated) == (Cause.NONE, Aftermath.ALIVE, True)
    assert (failure.sent, failure.suspect, failure.verdict.backend) == (Sent.MAYBE, False, "a:0")


def test_a_call_that_alone_is_stuck_is_stalled_and_not_truncated() -> None:
    failure = judge().of_call(STALLED, ME)
    assert (failure.verdict.cause, failure.verdict.aftermath, failure.truncated) == (
        Cause.STALLED,
        Aftermath.ALIVE,
        False,
    )
    assert "no progress for 6 s" in failure.verdict.message


@pytest.mark.parametrize("inflight_at_failure", [0, 1, 5])
def test_what_ended_the_process_ended_its_calls(inflight_at_failure: int) -> None:
    one = judge()
    one.set_verdict(KILLED, crowd_of(inflight_at_failure))
    failure = one.of_call(refused(), ME)
    assert (failure.verdict.cause, failure.verdict.exit, failure.suspect) == (Cause.KILLED, -9, False)
    assert failure.sent is Sent.NOTHING


@pytest.mark.parametrize(("inflight_at_failure", "suspect"), [(1, True), (5, False)])
def test_who_was_alone_is_the_suspect(inflight_at_failure: int, suspect: bool) -> None:
    one = judge()
    one.set_verdict(replace(KILLED, cause=Cause.STALLED), crowd_of(inflight_at_failure))
    failure = one.of_call(CUT, ME)
    assert (failure.suspect, failure.alone) == (suspect, suspect)


def test_one_of_several_suspects_was_not_alone() -> None:
    one = judge()
    one.set_verdict(replace(KILLED, cause=Cause.NATIVE_CRASH), crowd_of(3))
    failure = one.of_call(CUT, ME)
    assert (failure.suspect, failure.alone) == (True, False)


# -- asking what happened ----------------------------------------------------------------------------------------------


async def test_where_there_is_a_verdict_nothing_is_asked() -> None:
    dialer = scripted()
    one = judge(dialer)
    one.set_verdict(KILLED, crowd_of(2))
    assert (await one.diagnose(CUT, ME)).verdict.cause is Cause.KILLED
    assert dialer.asked == []


async def test_an_exit_that_is_seen_a_moment_later_explains_it() -> None:
    one = judge(scripted(health=refused()), cadence=NEVER)
    asking = asyncio.ensure_future(one.diagnose(ExchangeError(Fault.RESET, "reset by peer"), ME))
    await asyncio.sleep(0)
    assert not asking.done()
    one.set_verdict(KILLED, crowd_of(1))
    assert (await asking).verdict.cause is Cause.KILLED


async def test_a_server_that_answers_has_just_ended_its_answer() -> None:
    dialer = scripted()
    failure = await judge(dialer).diagnose(CUT, ME)
    assert (failure.truncated, dialer.asked) == (True, ["/health"])


@pytest.mark.parametrize("health", [refused(), None], ids=["refused", "silent"])
async def test_without_evidence_the_wire_is_believed_after_a_while(health: ExchangeError | None) -> None:
    failure = await judge(scripted(health=health)).diagnose(CUT, ME)
    assert (failure.verdict.cause, failure.truncated) == (Cause.NONE, True)


async def test_a_refused_call_waits_for_evidence_although_the_server_answers() -> None:
    failure = await judge(scripted()).diagnose(refused(), ME)
    assert (failure.sent, failure.verdict.cause, failure.truncated) == (Sent.NOTHING, Cause.UNREACHABLE, False)


async def test_a_503_makes_the_monitor_look_and_its_verdict_is_waited_for() -> None:
    """The generation thread is dead: the monitor condemns the process, and the request learns of it."""
    one = judge(scripted(health=(503, b"{}")), cadence=replace(NEVER, exit_wait=0.01))
    wedged = Failure(Cause.OOM, Aftermath.WEDGED, "a:0 is being replaced")
    one.recheck = lambda: one.set_verdict(wedged, crowd_of(2))
    failure = await one.diagnose(CUT, ME)
    assert (failure.verdict.cause, failure.verdict.aftermath) == (Cause.OOM, Aftermath.WEDGED)


@pytest.mark.parametrize("process", [True, False])
async def test_a_503_that_condemns_nothing(process: bool) -> None:
    one = judge(scripted(health=(503, b"{}")), process=process)
    failure = await one.diagnose(CUT, ME)
    assert failure.verdict.cause is (Cause.NONE if process else Cause.UNREACHABLE)
    assert isinstance(one.recheck, Rechecks)
    assert one.recheck.count == 1


async def test_a_stall_that_the_watch_saw_needs_no_second_opinion() -> None:
    dialer = scripted()
    failure = await judge(dialer).diagnose(STALLED, ME)
    assert (failure.verdict.cause, dialer.asked) == (Cause.STALLED, [])


# -- without a process -------------------------------------------------------------------------------------------------


async def test_a_remote_server_that_answers_has_just_ended_its_answer() -> None:
    failure = await judge(process=False).diagnose(CUT, ME)
    assert (failure.verdict.cause, failure.truncated, failure.verdict.aftermath) == (Cause.NONE, True, Aftermath.ALIVE)
    assert "running" not in failure.verdict.message, "nothing is known of its process"


@pytest.mark.parametrize("health", [refused(), None, (503, b"{}")], ids=["refused", "silent", "503"])
async def test_a_remote_server_that_does_not_answer_cannot_be_reached(health: ExchangeError | None) -> None:
    """No exit will explain it: nothing is waited for beyond the probe."""
    one = judge(scripted(health=health), process=False, cadence=Cadence(evidence_wait=0.01, exit_wait=3600.0))
    failure = await one.diagnose(CUT, ME)
    assert (failure.verdict.cause, failure.verdict.aftermath, failure.truncated) == (
        Cause.UNREACHABLE,
        Aftermath.UNKNOWN,
        False,
    )


@pytest.mark.parametrize("process", [True, False])
async def test_a_shortage_of_our_own_is_no_failure_of_the_replica(process: bool) -> None:
    dialer = scripted()
    failure = await judge(dialer, process=process).diagnose(EXHAUSTED, ME)
    assert (failure.verdict.cause, failure.verdict.reason, failure.sent) == (
        Cause.UNREACHABLE,
        Reason.BUSY,
        Sent.NOTHING,
    )
    assert dialer.asked == []


@pytest.mark.parametrize("process", [True, False])
async def test_a_stall_is_told_alike(process: bool) -> None:
    failure = await judge(process=process).diagnose(STALLED, ME)
    assert (failure.verdict.cause, failure.verdict.aftermath, failure.truncated) == (
        Cause.STALLED,
        Aftermath.ALIVE,
        False,
    )
    assert "said nothing to this request" in failure.verdict.message


async def test_a_process_that_is_slow_to_end_is_waited_for_once_its_port_is_closed() -> None:
    """A new instance follows. Without the verdict it would be taken for one that runs on, and cannot answer."""
    one = judge(Scripted(lambda _request: refused()), cadence=replace(HASTY, ending_wait=3600.0))
    for error in (CUT, refused()):
        asking = asyncio.ensure_future(one.diagnose(error, ME))
        await asyncio.sleep(0.1)
        assert not asking.done()
        one.set_verdict(KILLED, crowd_of(1))
        assert (await asking).verdict is KILLED
        one.verdict = None
        one.settled.clear()
