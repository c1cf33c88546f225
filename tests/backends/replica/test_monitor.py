"""The liveness monitor with a scripted backend: what it sees, when it asks for work, what makes it condemn."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import pytest

from backends.admission.inflight import NOT_BEGUN, InFlight
from backends.admission.lease import Lease
from backends.admission.pace import SLOWEST, TOKENISED
from backends.diagnosis.suspects import RequestProgress
from backends.domain.cadence import Cadence
from backends.domain.failure import HARMLESS, Cause
from backends.domain.report import EngineReport
from backends.domain.spec import BackendSpec, Launch, Timeouts
from backends.domain.state import Health
from backends.domain.work import Work
from backends.replica import liveness
from backends.replica.expected_end import RESET_TOLD, TAKEN_IN
from backends.replica.liveness import Condemn
from backends.replica.monitor import LAST_WORDS, LONE_SILENCE_FACTOR, LivenessMonitor, Watched
from backends.upstream.exchange import ExchangeError, Fault, Request
from tests.backends.diagnosis.corpus import CORPUS, lines_of
from tests.lives import MODEL, TOKEN, Scripted, ScriptedExchange, Told, engine, instance, refused, until

METAL = "[METAL] Command buffer execution failed: "
OOM = f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
DIED = f"2026-11-22 17:30:00,000 - ERROR - mlx_lm.server generation thread died: {OOM}"
BUSY: Told = (503, b"{}")


QUICK = Cadence(liveness_tick=0.005, probe_interval=0.005)


class Patient:
    """One ready replica; its answers can be changed at any moment. ``now`` is its clock. ``process``: it is ours."""

    def __init__(
        self,
        *,
        is_mlx: bool = True,
        progress: float = 100.0,
        pid: int | None = None,
        process: bool = True,
        cadence: Cadence = QUICK,
        probes: int = 2,
    ) -> None:
        self.probes = probes  # that are awaited at the start
        self.health: Told = (200, b"{}")
        self.completion: Told = (200, TOKEN)
        self.now = 1000.0
        self.dialer = Scripted(lambda request: self.health if request.path == "/health" else self.completion)
        kind, patience = engine(is_mlx=is_mlx), Timeouts(progress=progress)
        self.spec = BackendSpec("m:0", "m", 0, MODEL, Launch(()), kind, timeouts=patience)
        self.on_change: Callable[[], None] = lambda: None
        self.proofs = 0
        self.flight = InFlight()
        self.instance = instance(
            self.dialer,
            self.spec,
            cadence=cadence,
            clock=lambda: self.now,
            inflight=self.flight,
            proved=self.proved,
            pid=pid,
        )
        self.watch = self.instance.monitor
        if not process:
            self.watch = LivenessMonitor(
                Watched(1, self.dialer, self.instance.identity),
                self.spec,
                self.flight,
                clock=lambda: self.now,
                cadence=cadence,
                proved=self.proved,
            )
        self.watching: asyncio.Task[Condemn] | None = None

    def proved(self) -> None:
        self.proofs += 1

    def over(self, lease: Lease) -> None:
        self.flight.over(lease)

    def released(self, lease: Lease) -> None:
        self.flight.discard(lease)

    def ask(self) -> tuple[Lease, ScriptedExchange]:
        """One in flight that waits since now."""
        lease = Lease(self, self.instance.calls, self.now)
        self.flight.add(lease)
        exchange = ScriptedExchange(None)
        exchange.waiting_since = self.now
        lease.exchange = exchange
        return lease, exchange

    def say(self, line: str) -> None:
        self.instance.log.feed(line)

    async def __aenter__(self) -> Self:
        self.watching = asyncio.ensure_future(self.watch.until_condemned())
        await self.probed(self.probes)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.watching is not None
        self.watching.cancel()
        await asyncio.wait({self.watching})
        await until(lambda: all(exchange.closed for exchange in self.dialer.opened))

    async def probed(self, times: int = 2) -> None:
        """Until it has been looked at again, and again."""
        assert self.watching is not None
        watching, seen = self.watching, self.dialer.asked.count("/health")
        await until(lambda: watching.done() or self.dialer.asked.count("/health") >= seen + times)

    @property
    def canaries(self) -> int:
        return sum(path != "/health" for path in self.dialer.asked)

    async def well(self) -> None:
        await self.probed(3)
        assert self.watching is not None
        assert not self.watching.done()

    async def finding(self) -> Condemn:
        assert self.watching is not None
        return await asyncio.wait_for(asyncio.shield(self.watching), 20.0)

    async def pass_time(self, seconds: float, meanwhile: Callable[[], Any] = lambda: None) -> None:
        """In steps that no one could mistake for our own absence; done at once if it is condemned."""
        assert self.watching is not None
        left = seconds
        while left > 0 and not self.watching.done():
            step = min(1.0, left)
            self.now += step
            left -= step
            meanwhile()
            await self.probed(1)


def ended(exchanges: list[ScriptedExchange]) -> list[Fault | None]:
    return [exchange.aborted.fault if exchange.aborted else None for exchange in exchanges]


# -- well --------------------------------------------------------------------------------------------------------------


async def test_one_that_is_well_is_given_no_work() -> None:
    async with Patient() as p:
        await p.pass_time(50)
        await p.well()
        assert p.canaries == 0
        assert p.watch._answered_at > 1000
        signs = p.watch.signs()
        assert (signs.inflight, signs.waiting, signs.quiet, signs.hint) == (0, 0, 0.0, None)


# -- condemned by its health -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lines", "cause"), [([], Cause.WEDGE), ([DIED], Cause.OOM)])
async def test_a_503_of_mlx_is_the_end(lines: list[str], cause: Cause) -> None:
    async with Patient() as p:
        for line in lines:
            p.say(line)
        p.health, p.completion = BUSY, (404, b'{"error": "generation thread died"}')
        assert await p.finding() == Condemn(cause, "it answers /health with 503: its generation thread is dead")


ENDED = EngineReport(active=1, pooled=0, peak=1, generating=False)
IDLE = EngineReport(active=1, pooled=0, peak=1, generating=True, reading=0, decoding=0)


@pytest.mark.parametrize(("lines", "cause"), [([], Cause.WEDGE), ([DIED], Cause.OOM)])
async def test_the_end_of_the_generation_thread_is_known_without_a_probe(lines: list[str], cause: Cause) -> None:
    """The news may come before the last words of the thread, by another pipe."""
    cadence = Cadence(liveness_tick=60.0, probe_interval=60.0)
    async with Patient(cadence=cadence, probes=0) as p:
        p.watch.note_report(ENDED)
        await asyncio.sleep(0)
        assert not p.watch.thread_ended
        for line in lines:
            p.say(line)
        p.now += LAST_WORDS
        p.watch.note_report(ENDED)
        finding = await p.finding()
        assert finding == Condemn(cause, "its generation thread has ended")
        failure = p.instance.of_condemned(finding)
        assert (failure.cause, bool(failure.evidence)) == (cause, bool(lines))


@pytest.mark.parametrize("generating", [True, None])
async def test_a_report_of_a_thread_that_runs_is_no_news(generating: bool | None) -> None:
    async with Patient() as p:
        p.watch.note_report(replace(ENDED, generating=generating))
        p.now += LAST_WORDS
        await p.well()


async def test_a_503_of_another_server_has_to_last() -> None:
    async with Patient(is_mlx=False) as p:
        p.health = BUSY
        await p.finding()
        assert p.watch._same_health >= liveness.FOREIGN_503S_TO_CONDEMN


async def test_a_port_that_nobody_listens_on_any_more() -> None:
    async with Patient() as p:
        p.health = refused()
        assert "no longer listens" in (await p.finding()).reason
        assert p.watch._same_health >= liveness.REFUSALS_TO_CONDEMN


async def test_probes_that_are_not_answered_hold_up_nothing() -> None:
    """The rest is looked at while /health is silent."""
    async with Patient(progress=10.0) as p:
        p.health = None
        await until(lambda: p.dialer.opened[-1].waiting_since)
        _, exchange = p.ask()
        for _ in range(11):
            p.now += 1.0
            await asyncio.sleep(0.01)
        assert (await p.finding()).cause is Cause.STALLED
        assert exchange.aborted is None, "that is for whoever replaces it"


def test_health_is_counted_and_an_answer_is_remembered() -> None:
    p = Patient()
    p.now = 0.0
    for health, same, answered in [
        (Health.OK, 1, 1.0),
        (Health.OK, 2, 2.0),
        (Health.SILENT, 1, 2.0),
        (Health.REFUSED, 1, 2.0),
        (Health.UNAVAILABLE, 1, 5.0),
        (Health.LOADING, 1, 6.0),
        (Health.LOADING, 2, 7.0),
    ]:
        p.now += 1.0
        p.watch.note_health(health)
        assert (p.watch.health, p.watch._same_health, p.watch._answered_at) == (health, same, answered)
    assert p.watch.health_since == 6.0


def test_one_missed_check_is_no_outage() -> None:
    p = Patient()
    told = []
    for health in (Health.OK, Health.SILENT, Health.SILENT, Health.OK, Health.REFUSED, Health.REFUSED):
        p.watch.note_health(health)
        told.append((p.watch.responsive, p.watch.faltering))
    well, faltering, gone = (True, False), (False, True), (False, False)
    assert told == [well, faltering, gone, well, faltering, faltering]


SLOW = Cadence(liveness_tick=3600.0, probe_interval=3600.0)


async def test_a_503_that_somebody_else_saw_is_looked_into_at_once() -> None:
    p = Patient(cadence=SLOW)
    p.watching = asyncio.ensure_future(p.watch.until_condemned())
    await until(lambda: p.watch.health is Health.OK)
    p.health = BUSY
    p.watch.recheck()
    assert (await p.finding()).cause is Cause.WEDGE


async def test_a_503_of_another_server_is_left_to_the_regular_probes() -> None:
    p = Patient(cadence=SLOW, is_mlx=False)
    p.watching = asyncio.ensure_future(p.watch.until_condemned())
    await until(lambda: p.watch.health is Health.OK)
    p.watch.recheck()
    assert not p.watch._recheck.is_set()
    p.watching.cancel()
    await asyncio.wait({p.watching})


# -- condemned by silence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [True, False], ids=["supervised", "remote"])
async def test_silence_while_somebody_waits(process: bool) -> None:
    async with Patient(progress=30.0, process=process) as p:
        p.ask()
        await p.pass_time(29.0)
        await p.well()
        await p.pass_time(2.0)
        finding = await p.finding()
        assert finding.cause is Cause.STALLED
        assert "waiting requests: 1" in finding.reason


async def test_a_prefill_that_is_told_in_the_output_is_progress() -> None:
    async with Patient(progress=30.0) as p:
        p.ask()
        await p.pass_time(29.0)
        p.say("2026-11-22 17:30:00,000 - INFO - Prompt processing progress: 2048/4096")
        await p.pass_time(29.0)
        await p.well()
        await p.pass_time(2.0)
        assert (await p.finding()).cause is Cause.STALLED


@pytest.mark.parametrize("process", [True, False], ids=["supervised", "remote"])
async def test_one_that_is_stuck_alone_is_ended_and_the_others_go_on(process: bool) -> None:
    async with Patient(progress=10.0, process=process) as p:
        _, stuck = p.ask()
        _, other = p.ask()

        def speak() -> None:
            other.last_heard = p.now

        await p.pass_time(LONE_SILENCE_FACTOR * 10.0 - 1.0, speak)
        assert ended([stuck, other]) == [None, None]
        await p.pass_time(2.0, speak)
        await until(lambda: stuck.aborted)
        assert ended([stuck, other]) == [Fault.STALLED, None]
        assert "no progress for 30 s" in str(stuck.aborted)
        await p.well()


async def test_silence_of_an_answer_in_one_piece_is_none() -> None:
    async with Patient(progress=10.0) as p:
        lease, exchange = p.ask()
        lease.work = Work(max_tokens=5000, one_piece=True)
        await p.pass_time(LONE_SILENCE_FACTOR * 10.0 + 2.0)
        await p.well()
        p.watch.hint = Cause.OOM
        assert (await p.finding()).cause is Cause.OOM
        assert ended([exchange]) == [None]


async def test_nothing_is_held_against_it_that_happened_in_our_absence() -> None:
    """A Mac that slept comes back to clocks that have moved on."""
    async with Patient(progress=30.0) as p:
        _, exchange = p.ask()
        p.now += 8 * 3600.0
        await p.well()
        assert exchange.aborted is None
        await p.pass_time(31.0)
        assert (await p.finding()).cause is Cause.STALLED


# -- answers in one piece, long prompts, abandoned requests ------------------------------------------------------------


async def test_an_answer_in_one_piece_has_the_time_that_its_tokens_need_then_a_token_is_asked_for() -> None:
    async with Patient(progress=10.0) as p:
        lease, exchange = p.ask()
        lease.work = Work(max_tokens=200, one_piece=True)
        due = 10.0 + 200 / SLOWEST
        await p.pass_time(due - 1.0)
        assert p.canaries == 0
        await p.pass_time(2.0)
        await until(lambda: p.canaries)
        await p.well()
        assert lease.confirmed == 1, "it generates, so the answer may take as long again"
        await p.pass_time(2 * due)
        await until(lambda: exchange.aborted)
        assert ended([exchange]) == [Fault.STALLED]


async def test_an_answer_in_one_piece_on_a_wedged_server_does_not_wait_for_ever() -> None:
    async with Patient(progress=10.0) as p:
        lease, _ = p.ask()
        lease.work = Work(max_tokens=5, one_piece=True)
        p.completion = ExchangeError(Fault.STALLED, "nothing")
        await p.pass_time(12.0)
        assert (await p.finding()).cause is Cause.WEDGE


@pytest.mark.parametrize("process", [True, False], ids=["supervised", "remote"])
async def test_silence_while_a_long_prompt_is_tokenised_is_judged_by_its_tokens(process: bool) -> None:
    async with Patient(progress=10.0, process=process) as p:
        _, bystander = p.ask()
        lease, reading = p.ask()
        lease.work = Work(prompt_tokens=1_000_000)
        p.health = ExchangeError(Fault.STALLED, "it holds the interpreter lock")
        await p.pass_time(1_000_000 / TOKENISED + 9.0)
        await p.well()
        assert ended([bystander, reading]) == [None, None]
        await p.pass_time(3.0)
        assert (await p.finding()).cause is Cause.STALLED


async def test_pauses_that_grow_step_by_step_are_no_stall() -> None:
    async with Patient(progress=10.0) as p:
        _, exchange = p.ask()
        for pause in (6.0, 8.0, 11.0, 14.0, 17.0):
            await p.pass_time(pause)
            exchange.last_heard = p.now
            await p.probed()
        await p.well()
        await p.pass_time(30.0)
        assert (await p.finding()).cause is Cause.STALLED


async def test_a_server_that_only_reads_for_a_client_that_has_left_may_be_silent() -> None:
    async with Patient(progress=10.0) as p:
        lease, _ = p.ask()
        lease.work = Work(prompt_tokens=1_000_000)
        abandon(lease)
        p.health = ExchangeError(Fault.STALLED, "it holds the interpreter lock")
        await p.pass_time(90.0)
        await p.well()
        await p.pass_time(22.0)
        assert (await p.finding()).cause is Cause.STALLED


def abandon(lease: Lease) -> None:
    lease.hang_up()
    lease.release()
    assert lease.abandoned


async def test_requests_are_moved_from_a_server_that_an_abandoned_one_occupies() -> None:
    async with Patient(progress=10.0) as p:
        p.flight.batches = False
        left, _ = p.ask()
        left.work = Work(max_tokens=1000, one_piece=True)
        abandon(left)
        lease, waiting = p.ask()
        await p.pass_time(11.0)
        await until(lambda: waiting.aborted)
        assert ended([waiting]) == [Fault.OCCUPIED]
        assert (p.watch.occupied, p.watch.responsive) == (True, False)
        abandon(lease)
        await p.well()
        left.over()
        lease.over()
        await until(lambda: not p.watch.occupied)
        assert p.proofs == 1, "requests in line may go there again"


async def test_requests_that_an_engine_does_not_begin_beside_another_are_moved() -> None:
    async with Patient(progress=100.0) as p:
        early, stream = p.ask()
        early.progress = RequestProgress(decoding=True)
        p.now += 1.0
        _, late = p.ask()

        def speak() -> None:
            stream.last_heard = p.now

        await p.pass_time(NOT_BEGUN + 1.0, speak)
        await until(lambda: late.aborted)
        assert ended([stream, late]) == [None, Fault.OCCUPIED]
        assert p.flight.sequential
        await p.well()


async def test_it_is_condemned_once_the_abandoned_one_should_have_ended_and_no_token_comes() -> None:
    async with Patient(progress=10.0) as p:
        p.flight.batches = False
        left, _ = p.ask()
        left.work = Work(max_tokens=100, one_piece=True)
        abandon(left)
        p.completion = ExchangeError(Fault.STALLED, "nothing")
        p.watch.suspected = True
        await p.pass_time(10.0 + 100 / SLOWEST - 1.0)
        await until(lambda: p.canaries)
        await p.well()
        await p.pass_time(2.0)
        assert (await p.finding()).cause is Cause.WEDGE


async def test_one_that_batches_is_not_excused_by_an_abandoned_request() -> None:
    async with Patient(progress=10.0) as p:
        left, _ = p.ask()
        left.work = Work(max_tokens=100_000, one_piece=True)
        abandon(left)
        p.completion = ExchangeError(Fault.STALLED, "nothing")
        p.watch.suspected = True
        assert (await p.finding()).cause is Cause.WEDGE


@pytest.mark.parametrize("process", [True, False], ids=["supervised", "remote"])
async def test_a_token_proves_that_a_reset_request_is_over_where_no_log_tells(process: bool) -> None:
    async with Patient(process=process) as p:
        p.say('127.0.0.1 - - [22/Nov/2026 17:30:00] "POST /v1/chat/completions HTTP/1.1" 200 -')
        batched, _ = p.ask()
        alone, _ = p.ask()
        alone.unbatchable = True
        for lease in (batched, alone):
            lease.work = Work(max_tokens=10_000)
            abandon(lease)
            lease.hung_up_at = p.now
        p.now += 1.0
        await until(lambda: not alone.abandoned)
        await p.well()
        assert batched.abandoned is process, "a token beside it proves nothing, and the log will tell"


async def test_a_reset_that_the_log_does_not_tell_of_came_after_the_last_write() -> None:
    async with Patient() as p:
        p.say('127.0.0.1 - - [22/Nov/2026 17:30:00] "POST /v1/chat/completions HTTP/1.1" 200 -')
        ended, calls, reads = (p.ask()[0] for _ in range(3))
        ended.progress = calls.progress = RequestProgress(decoding=True)
        ended.work = Work(prompt_tokens=100_000, max_tokens=100_000)
        calls.work = Work(max_tokens=100_000, tools=True)
        reads.work = Work(prompt_tokens=100_000)
        for lease in (ended, calls, reads):
            abandon(lease)
            lease.hung_up_at = p.now
        await p.pass_time(RESET_TOLD + 1.0)
        await until(lambda: not ended.abandoned)
        await p.well()
        assert calls.abandoned, "nothing is written while a tool call is generated"
        assert reads.abandoned, "nothing is written while a prompt is read"


async def test_a_batch_without_members_has_ended_what_was_reset() -> None:
    """The log may not tell of it: the lines of handlers that fail together are mixed."""
    async with Patient() as p:
        p.say('127.0.0.1 - - [22/Nov/2026 17:30:00] "POST /v1/chat/completions HTTP/1.1" 200 -')
        (lease, _), (large, _) = p.ask(), p.ask()
        lease.work, large.work = Work(prompt_tokens=10_000), Work(prompt_tokens=1_000_000)
        for one in (lease, large):
            abandon(one)
            one.hung_up_at = p.now
        p.watch.note_report(IDLE)
        await p.pass_time(TAKEN_IN + 1.0)
        p.watch.note_report(replace(IDLE, decoding=1))
        await p.well()
        assert lease.abandoned, "others are members, and it may be one of them; before, it may not have been one yet"
        p.watch.note_report(IDLE)
        await until(lambda: not lease.abandoned)
        await p.well()
        assert large.abandoned, "its prompt may not be in tokens yet, and is no member before"


async def test_a_log_without_the_lines_of_requests_tells_nothing() -> None:
    """A wrapper may have sent them elsewhere."""
    async with Patient() as p:
        lease, _ = p.ask()
        lease.work = Work(max_tokens=10_000)
        abandon(lease)
        lease.hung_up_at = p.now
        p.now += 1.0
        await until(lambda: not lease.abandoned)


async def test_an_abandoned_one_that_should_have_ended_is_over_when_a_token_comes() -> None:
    async with Patient(progress=10.0) as p:
        lease, exchange = p.ask()
        lease.work = Work(max_tokens=100)
        abandon(lease)
        await p.pass_time(10.0 + 100 / SLOWEST + 1.0)
        await until(lambda: not lease.abandoned)
        assert exchange.closed
        assert len(p.flight) == 0


# -- the canary --------------------------------------------------------------------------------------------------------


async def test_output_that_names_a_cause_makes_us_ask_for_a_token_and_is_then_forgotten() -> None:
    async with Patient() as p:
        p.say("all is well")
        p.say(DIED)
        await until(lambda: p.canaries)
        await until(lambda: p.watch.hint is None)
        assert p.watch.since == p.instance.log.position
        await p.well()
        assert p.canaries == 1


@pytest.mark.parametrize(
    "number", [i for i, row in enumerate(CORPUS) if row.expected not in HARMLESS and not row.silent]
)
async def test_every_cause_that_the_table_knows_is_noticed(number: int) -> None:
    p = Patient()
    for line in lines_of(CORPUS[number].text):
        p.say(line)
        p.watch._read_output(p.instance.log)
    assert p.watch.hint is CORPUS[number].expected


async def test_a_line_that_only_looks_like_trouble_is_no_hint() -> None:
    async with Patient() as p:
        p.say("2026-11-22 17:30:00,000 - ERROR - JSONDecodeError: Expecting value - Raw body: nonsense")
        await p.well()
        assert p.canaries == 0


@pytest.mark.parametrize(
    "answer", [(200, TOKEN), (404, b'{"error": "list index out of range"}')], ids=["token", "bad request"]
)
async def test_a_suspicion_that_a_token_clears(answer: Told) -> None:
    async with Patient() as p:
        p.completion = answer
        p.watch.suspected = True
        await until(lambda: not p.watch.suspected)
        await p.well()


@pytest.mark.parametrize(
    ("answer", "hint", "cause"),
    [
        (ExchangeError(Fault.STALLED, "nothing"), None, Cause.WEDGE),
        (ExchangeError(Fault.RESET, "reset"), Cause.OOM, Cause.OOM),
        ((404, b'{"error": "generation thread died"}'), None, Cause.WEDGE),
    ],
)
async def test_a_canary_that_gets_no_token(answer: Told, hint: Cause | None, cause: Cause) -> None:
    async with Patient() as p:
        p.completion = answer
        p.watch.hint = hint
        p.watch.suspected = True
        finding = await p.finding()
        assert (finding.cause, finding.reason) == (cause, "it answers HTTP but generates nothing")


async def test_a_busy_one_is_not_asked_for_work() -> None:
    async with Patient() as p:
        lease, _ = p.ask()
        p.watch.suspected = True
        await p.well()
        assert p.canaries == 0
        p.flight.discard(lease)
        await until(lambda: p.canaries == 1)


async def test_a_canary_that_stands_in_line_condemns_nobody() -> None:
    async with Patient() as p:
        leases: list[Lease] = []

        def somebody_comes(request: Request) -> Told:
            if request.path == "/health":
                return p.health
            leases.append(p.ask()[0])
            return ExchangeError(Fault.STALLED, "nothing")

        p.dialer.script = somebody_comes
        p.watch.suspected = True
        await until(lambda: leases)
        await p.well()
        assert not p.watch._canary_failed


# -- what the end of a request tells -----------------------------------------------------------------------------------


def ending(p: Patient, *, silent: float = 0.0, **how: Any) -> Lease:
    lease, exchange = p.ask()
    exchange.waiting_since = p.now - silent
    for name, value in how.items():
        setattr(lease, name, value)
    return lease


@pytest.mark.parametrize(
    ("silent", "how", "opened", "suspected"),
    [
        (QUICK.abandoned_after, {}, False, True),
        (QUICK.abandoned_after - 0.1, {}, False, False),
        (QUICK.abandoned_after, {"work": Work(one_piece=True)}, False, False),
        (QUICK.abandoned_after, {"completed": True}, False, False),
        (0.0, {"failed": True}, True, True),
    ],
)
async def test_what_makes_it_suspect(silent: float, how: dict[str, Any], opened: bool, suspected: bool) -> None:
    p = Patient()
    p.watch.request_ended(ending(p, silent=silent, **how), breaker_opened=opened)
    assert p.watch.suspected is suspected


async def test_a_full_answer_clears_the_doubts_that_are_older_than_its_request() -> None:
    p = Patient()
    before = ending(p, completed=True)
    p.say(DIED)
    p.watch._read_output(p.instance.log)
    p.watch.suspected = True
    p.watch.request_ended(before, breaker_opened=False)
    assert (p.watch.suspected, p.watch.hint) == (False, Cause.OOM)
    p.now += 1.0
    p.watch.request_ended(ending(p, completed=True), breaker_opened=False)
    assert p.watch.hint is None
    assert p.watch.since == p.instance.log.position


# -- its own end -------------------------------------------------------------------------------------------------------


async def test_a_bug_in_the_probes_is_not_kept_to_themselves() -> None:
    async with Patient() as p:
        answers: dict[str, Told] = {}
        p.dialer.script = lambda _: answers["bug"]
        with pytest.raises(RuntimeError, match="the probes of m:0 ended") as caught:
            await p.finding()
        assert isinstance(caught.value.__cause__, KeyError)
