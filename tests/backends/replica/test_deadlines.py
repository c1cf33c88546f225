"""Silence that is too long by the rhythm of the model: an engine that is simulated on the clock of the monitor.

The engine does what ``mlx_lm.server`` does on its one thread: it takes all new prompts (tokenises each, and searches
its cache for each in time quadratic in the longest conversation), then goes round: one token for each answer, one
prefill step for all prompts that are read.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from backends.admission.lease import Lease
from backends.admission.pace import DOUBLED, SLOWEST
from backends.admission.rhythm import FLOOR, GAPS, SEARCH
from backends.diagnosis.suspects import RequestProgress
from backends.domain.activity import Activity
from backends.domain.cadence import Cadence
from backends.domain.failure import Cause
from backends.domain.state import Health
from backends.domain.work import Work
from backends.mlx_server import PREFILL_STEP
from backends.replica.liveness import STOPPED_SILENCE, Condemn
from backends.replica.rhythm_watch import COLD_AFTER
from tests.backends.replica.test_monitor import Patient
from tests.lives import ScriptedExchange

PROGRESS = 120.0
TICK = Cadence().liveness_tick
IDLE = 0.0025  # of a core: what a server takes that does nothing, and is asked for /health
ROUNDS = 3  # ticks between an event and the tick that acts on it


@dataclass(frozen=True)
class Machine:
    """Seconds and shares of a core. ``gap``: between two tokens of one answer. ``crowded``: how much of it each further
    answer adds. ``aging``: how often the gap doubles over 32,768 tokens. ``step``: a prefill step of 2,048 tokens."""

    gap: float = 0.03
    crowded: float = 0.1
    aging: float = 1.0
    step: float = 0.5
    search: float = SEARCH
    share: float = 0.5  # while it writes
    reading: float = 0.01  # while it reads: a GPU does that


@dataclass(eq=False)
class Call:
    lease: Lease
    exchange: ScriptedExchange
    prompt: int
    cached: int
    answer: int
    withheld: int  # of the answer: the first tokens, of a tool call
    read: int = 0
    written: int = 0

    @property
    def begun(self) -> bool:
        return self.read >= self.prompt

    def hear(self, now: float) -> None:
        self.exchange.last_heard = now
        self.exchange.pieces += 1
        decoding = self.written > self.withheld
        self.lease.progress = RequestProgress(self.prompt, decoding=decoding, prompt_read=self.begun)


Period = tuple[float, float]  # seconds, share of a core


@dataclass(eq=False)
class Engine:
    """``work`` gives the periods of its thread; what ends one has happened when the next is asked for."""

    machine: Machine
    now: float  # the end of the period
    activity: float = 0.0  # seconds
    longest: int = 0
    waiting: list[Call] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    done: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seen = self.now
        self._share = IDLE
        self._periods = self.work()

    @property
    def busy(self) -> int:
        return len(self.calls) + len(self.waiting)

    def run(self, until: float) -> None:
        while self.now <= until:
            self._compute(self.now)
            seconds, self._share = next(self._periods)
            self.now += seconds
        self._compute(until)

    def _compute(self, until: float) -> None:
        self.activity += self._share * (until - self._seen)
        self._seen = until

    def work(self) -> Iterator[Period]:
        while True:
            if not (self.waiting or self.calls):
                yield 0.05, IDLE
            while self.waiting:
                yield from self._take(self.waiting.pop(0))
            yield from self._write()
            yield from self._read()
            self.done += [call for call in self.calls if call.written >= call.answer]
            self.calls = [call for call in self.calls if call.written < call.answer]

    def _take(self, call: Call) -> Iterator[Period]:
        yield call.prompt / 100_000 + self.machine.search * self.longest**2, 1.0
        call.read = call.cached
        call.hear(self.now)
        self.longest = max(self.longest, call.prompt)
        self.calls.append(call)

    def _write(self) -> Iterator[Period]:
        writing, machine = [call for call in self.calls if call.begun], self.machine
        if not writing:
            return
        longest = max(call.prompt + call.written for call in writing)
        crowd = 1 + machine.crowded * (len(writing) - 1)
        yield machine.gap * crowd * (1 + machine.aging * longest / DOUBLED), machine.share
        for call in writing:
            call.written += 1
            if call.written > call.withheld:
                call.hear(self.now)
        self.longest = max(self.longest, longest)

    def _read(self) -> Iterator[Period]:
        reading = [call for call in self.calls if not call.begun]
        if not reading:
            return
        tokens = min(PREFILL_STEP, max(call.prompt - call.read for call in reading))
        behind = max(call.read for call in reading)
        yield self.machine.step * tokens / PREFILL_STEP * len(reading) * (1 + behind / DOUBLED), self.machine.reading
        for call in reading:
            call.read = min(call.prompt, call.read + PREFILL_STEP)
            call.hear(self.now)


class Story:
    """A replica that is looked at every second."""

    def __init__(self, machine: Machine) -> None:
        self.p = Patient(progress=PROGRESS, cadence=Cadence())
        self.engine = Engine(machine, self.p.now)
        self.finding: Condemn | None = None
        self.stopped = self.wedged = False
        self.share = IDLE  # once it is wedged
        self.answers_health = True
        self.readable = True
        self.starved = 0.0  # part of its activity in which it waits for a core

    def ask(self, prompt: int, answer: int, *, cached: int = 0, withheld: int = 0) -> Call:
        lease, exchange = self.p.ask()
        lease.work = Work(prompt, answer, tools=withheld > 0)
        call = Call(lease, exchange, prompt, cached, answer, withheld)
        self.engine.waiting.append(call)
        return call

    def tick(self) -> None:
        self.p.now += TICK
        if self.stopped or self.wedged:
            self.engine.activity += 0.0 if self.stopped else self.share * TICK
        else:
            self.engine.run(self.p.now)
        self._end_answers()
        self._look()

    def _look(self) -> None:
        watch, now = self.p.watch, self.p.now
        watch.note_health(Health.OK if self.answers_health and not self.stopped else Health.SILENT)
        writing, heard = not watch._rhythm_watch.workload.reading, watch._heard_at
        if watch._meter.needs_sample(now - heard):
            watch._meter.note(self.activity(), now, heard=heard, writing=writing)
        if not self.readable:
            watch._meter.lost()
        finding = watch._assess()
        self.finding = finding if isinstance(finding, Condemn) else None

    def activity(self) -> Activity:
        seconds = self.engine.activity
        return Activity((1 - self.starved) * seconds, self.starved * seconds, self.stopped)

    def _end_answers(self) -> None:
        done, self.engine.done = self.engine.done, []
        for call in done:
            call.lease.written, call.lease.completed = (call.answer, 1.0), True
            self.p.watch.request_ended(call.lease, breaker_opened=False)
            call.lease.release()

    def run(self, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Ends early when it is condemned."""
        until = self.p.now + seconds
        while self.p.now < until and self.finding is None:
            meanwhile()
            self.tick()

    def until_condemned(self, within: float = 3 * PROGRESS) -> float:
        """Seconds."""
        began = self.p.now
        self.run(within)
        assert self.finding is not None, f"not found in {within:g} s"
        return self.p.now - began


WARM_UP = 100  # tokens, after which the rhythm is known


def warmed(machine: Machine, prompt: int = 500) -> Story:
    """One answer was given, and one is being written."""
    story = Story(machine)
    story.ask(prompt, WARM_UP)
    story.run(2 * WARM_UP * machine.gap + 10.0)
    story.ask(prompt, 10**9)
    story.run(20.0 + 3 * machine.gap)
    assert story.finding is None
    return story


# -- one that is wedged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.03, 0.1, 1.0])
@pytest.mark.parametrize("gap", [0.001, 0.03, 0.4])
async def test_a_wedge_while_answers_are_written_is_found_in_ten_seconds(gap: float, share: float) -> None:
    story = warmed(Machine(gap=gap, share=share))
    story.wedged = True
    assert FLOOR <= story.until_condemned() <= FLOOR + ROUNDS * TICK
    assert story.finding is not None
    assert story.finding.cause is Cause.STALLED
    assert "10 s is the most by what it has shown before" in story.finding.reason


async def test_a_slow_model_has_twenty_of_its_gaps() -> None:
    story = warmed(Machine(gap=2.5, aging=0.0))
    story.wedged = True
    assert GAPS * 2.5 <= story.until_condemned() <= GAPS * 2.5 * 1.25 + ROUNDS * TICK
    story = warmed(Machine(gap=30.0, aging=0.0))
    story.wedged = True
    assert story.until_condemned() <= PROGRESS + ROUNDS * TICK, "timeouts.progress is the upper bound"


async def test_nothing_is_held_against_it_before_its_rhythm_is_known() -> None:
    story = Story(Machine())
    story.ask(500, 10**9)
    story.run(3.0)
    story.wedged = True
    found = story.until_condemned()
    assert found <= FLOOR + ROUNDS * TICK, "100 tokens have come"
    story = Story(Machine())
    story.ask(500, 10**9)
    story.wedged = True
    assert PROGRESS <= story.until_condemned() <= PROGRESS + ROUNDS * TICK


async def test_one_that_is_stopped_needs_no_rhythm() -> None:
    story = Story(Machine())
    story.ask(30_000, 10**9)
    story.stopped = True
    assert STOPPED_SILENCE <= story.until_condemned() <= STOPPED_SILENCE + ROUNDS * TICK
    assert story.finding is not None
    assert "stopped" in story.finding.reason


async def test_one_that_is_stopped_in_an_answer_in_one_piece() -> None:
    story = Story(Machine())
    story.ask(500, 10**9).lease.work = Work(500, 10**9, one_piece=True)
    story.stopped = True
    assert story.until_condemned() <= STOPPED_SILENCE + ROUNDS * TICK


@pytest.mark.parametrize("step", [0.5, 4.0])
async def test_a_wedge_while_a_prompt_is_read_is_found_by_the_steps_before(step: float) -> None:
    story = warmed(Machine(step=step), prompt=3 * PREFILL_STEP)
    call = story.ask(20 * PREFILL_STEP, 100)

    def wedge() -> None:
        story.wedged = call.read > 10 * PREFILL_STEP

    story.run(20 * PREFILL_STEP, wedge)
    assert story.finding is not None
    silent = story.p.now - call.exchange.last_heard
    longest = step * 1.5
    assert FLOOR <= silent <= max(FLOOR, 6 * longest) + ROUNDS * TICK + longest


# -- one that only seems to be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.1])
async def test_a_process_that_works_may_be_silent(share: float) -> None:
    """It may be at a tool call, which is withheld until it is whole."""
    story = warmed(Machine(share=share))
    story.wedged, story.share = True, share
    assert story.until_condemned() >= PROGRESS


async def test_where_little_of_a_core_is_needed_its_rest_tells_nothing() -> None:
    story = warmed(Machine(share=0.01))
    story.wedged = True
    assert story.until_condemned() >= PROGRESS


async def test_one_that_does_not_answer_health_may_wait_for_its_pages() -> None:
    story = warmed(Machine())
    story.wedged, story.answers_health = True, False
    assert story.until_condemned() >= PROGRESS


async def test_a_process_that_cannot_be_read_is_given_its_time() -> None:
    story = warmed(Machine())
    story.wedged = True
    story.readable = False
    assert story.until_condemned() >= PROGRESS


async def test_a_tool_call_from_the_first_token_on_is_no_prefill() -> None:
    """Else its seconds would be taken for those of a step."""
    story = warmed(Machine())
    for _ in range(8):
        story.ask(500, 2000, withheld=1990)
        story.run(100.0)
    assert story.finding is None
    story.ask(500, 100)
    story.run(0.5)
    story.wedged = True
    assert story.until_condemned() <= 2 * FLOOR, "and the search beside 19,701 tokens"


@pytest.mark.parametrize("after", [5.0, 8 * 3600.0])
async def test_seconds_in_which_we_did_not_run_are_not_its(after: float) -> None:
    """The machine slept, and it with it."""
    story = warmed(Machine())
    story.p.now += after
    for name in ("now", "_seen"):
        setattr(story.engine, name, getattr(story.engine, name) + after)
    for call in story.engine.calls:
        call.withheld = 10**9  # a tool call has begun
    story.run(60.0)
    assert story.finding is None


async def test_pages_that_the_system_has_taken_come_back_first() -> None:
    """A model of 40 GB that was not used for an hour: it does not compute meanwhile."""
    story = warmed(Machine())
    story.engine.calls[0].answer = 0
    story.run(COLD_AFTER + 5.0)
    assert not story.engine.busy
    story.engine.machine = Machine(step=200.0, reading=IDLE)
    story.ask(500, 100)
    story.run(4 * FLOOR)
    assert story.finding is None


async def test_seconds_in_which_others_have_the_cores_are_not_its() -> None:
    """With nice 19 beside busy processes, a step that takes 1.4 s takes minutes."""
    story = Story(Machine(share=1.2, reading=1.2, step=400.0))
    story.starved = 0.99
    story.ask(6000, 100)
    story.run(1000.0)
    assert story.finding is None
    story.wedged = True
    assert story.until_condemned() <= PROGRESS + 15.0, "with the least that such a step may take"


async def test_seconds_of_an_earlier_silence_do_not_count() -> None:
    story = warmed(Machine(share=1.2))
    story.starved = 0.99
    story.engine.machine = Machine(share=1.2, reading=1.2, step=400.0)
    story.ask(2000, 1)
    story.run(450.0)
    assert story.finding is None
    story.wedged, story.readable = True, False
    assert story.until_condemned() <= PROGRESS + ROUNDS * TICK


async def test_one_that_has_the_cores_has_its_time_counted() -> None:
    story = Story(Machine(share=1.0, reading=1.0, step=400.0))
    story.ask(2000, 100)
    assert story.until_condemned() <= PROGRESS + 15.0


machines = st.builds(
    Machine,
    gap=st.floats(0.03, 1.5),
    crowded=st.floats(0.0, 1.0),
    aging=st.floats(0.0, 2.0),
    step=st.floats(0.02, 6.0),
    search=st.floats(0.0, 2 * SEARCH),
    share=st.floats(0.01, 1.2),
    reading=st.floats(IDLE, 1.0),
)
PAUSE = st.sampled_from([0.0, 0.0, 0.0, 0.3, 3.0, 20.0])  # seconds until the next request comes
requests = st.tuples(st.sampled_from([20, 500, 4000, 20_000, 60_000]), st.integers(1, 200), PAUSE)
MAX_INFLIGHT = 8
SEARCHES = [(60_000, 100, 3.0), *[(500, 50, 0.0)] * 12]
CROWD = [(500, 100, 20.0), *[(4000, 100, 0.0)] * 9]
LONG_PROMPT = [(20, 200, 3.0), (60_000, 10, 0.0), *[(20, 20, 0.0)] * 8]


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(machine=machines, asked=st.lists(requests, min_size=3, max_size=12), tools=st.booleans())
@example(machine=Machine(), asked=SEARCHES, tools=False)
@example(machine=Machine(gap=0.6, crowded=1.0, step=6.0), asked=CROWD, tools=False)
@example(machine=Machine(step=6.0, reading=IDLE), asked=LONG_PROMPT, tools=False)
def test_one_that_works_is_never_condemned(machine: Machine, asked: list[tuple[int, int, float]], tools: bool) -> None:
    """With tools, half of each answer is a call, which is withheld for a minute or two. In the end it is wedged."""
    if tools:
        machine = replace(machine, gap=min(machine.gap, 0.2), crowded=0.1)

    async def story() -> None:
        it = Story(machine)
        for prompt, answer, pause in asked:
            while it.engine.busy >= MAX_INFLIGHT and it.finding is None:
                it.tick()
            it.ask(prompt, answer, cached=prompt // 2, withheld=answer // 2 if tools else 0)
            it.run(pause)
        while it.engine.busy and it.finding is None:
            it.tick()
        assert it.finding is None
        it.ask(500, 10**9)
        it.run(5.0)
        it.wedged = True
        assert it.until_condemned(within=2 * PROGRESS) <= PROGRESS + 15.0, "whatever was learned"

    asyncio.run(story())


@pytest.mark.parametrize("share", [0.5, 0.05])
async def test_a_tool_call_may_take_longer_than_the_longest_silence(share: float) -> None:
    """While the process works as usual, and for as long as its ``max_tokens`` may take."""
    story = warmed(Machine(share=share))
    call = story.ask(500, 8000, withheld=7990)
    for other in story.engine.calls:
        other.withheld = 10**9
    story.run(2 * PROGRESS)
    assert story.finding is None
    assert call.exchange.aborted is None
    story.wedged = True
    assert story.until_condemned() <= 2 * FLOOR


async def test_a_process_that_works_and_never_sends_its_call_is_replaced() -> None:
    story = warmed(Machine())
    for call in story.engine.calls:
        call.lease.work, call.withheld = Work(500, 2000, tools=True), 10**9
    found = story.until_condemned(within=1000.0)
    assert PROGRESS + 2000 * 0.03 - 20 <= found <= PROGRESS + 2000 / SLOWEST
