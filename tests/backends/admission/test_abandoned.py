"""Requests whose clients have left and on which the backend still works: their slots, and when they are over."""

import pytest

from backends.admission.inflight import NOT_BEGUN, RECENT, InFlight
from backends.admission.lease import Lease
from backends.admission.limiter import ConcurrencyLimiter
from backends.admission.pace import ENOUGH, PAUSES, READ, SLOWEST, USUAL, Pace, UsualSilence
from backends.diagnosis.suspects import RequestProgress
from backends.domain.engine import Engine
from backends.domain.inflight_limit import InflightLimit
from backends.domain.work import Work
from backends.mlx_server import PREFILL_STEP, batches, is_batchable, notices_reset
from backends.upstream.exchange import ExchangeError, Fault, Request
from tests.backends.admission.test_pool import Call, Life, Replica, in_line, leased, pool

POST = Request("POST", "/v1/chat/completions")


def left(replica: Replica, lease: Lease, work: Work = Work()) -> Call:  # noqa: B008
    """Its client leaves while the backend is at work."""
    call = lease.open(POST, work)
    assert isinstance(call, Call)
    call.working = True
    lease.hang_up()
    lease.release()
    return call


async def test_it_keeps_its_slot_until_the_work_is_over() -> None:
    replica = Replica(limit=1)
    p = pool(replica)
    lease = leased(await p.acquire())
    call = left(replica, lease)
    flight = replica.flight
    assert (len(flight), flight.clients, flight.abandoned_count, flight.active) == (1, 0, 1, False)
    assert (flight.of(1), flight.abandoned(1)) == ([], [lease])
    waiting = await in_line(p)
    assert not waiting.done()
    call.over()
    assert leased(await waiting).spec.id == "m:0"
    call.over()
    assert len(flight) == 1, "its slot is given back once"


async def test_what_the_backend_has_ended_gives_its_slot_back_at_once() -> None:
    for working, whole, engine in (
        (False, False, Engine.MLX_LM),
        (True, True, Engine.MLX_LM),
        (True, False, Engine.OTHER),
    ):
        replica = Replica(limit=1)
        life = Life()
        life.identity.engine = engine
        lease = Lease(replica, life, 0.0)
        replica.flight.add(lease)
        call = lease.open(POST)
        assert isinstance(call, Call)
        call.working = working
        lease.hang_up(whole=whole)
        lease.release()
        assert (call.closed, len(replica.flight)) == (True, 0), "other servers notice when a client leaves"


async def test_an_end_that_comes_before_the_release_is_an_end() -> None:
    replica = Replica(limit=1)
    lease = leased(await pool(replica).acquire())
    call = lease.open(POST)
    assert isinstance(call, Call)
    call.working = True
    lease.hang_up()
    call.over()
    assert len(replica.flight) == 1
    lease.release()
    assert len(replica.flight) == 0


async def test_the_log_tells_by_the_port_that_a_reset_was_noticed() -> None:
    replica = Replica(limit=2)
    p = pool(replica)
    reset, silent = [leased(await p.acquire()) for _ in range(2)]
    for port, lease in enumerate((reset, silent), 5001):
        left(replica, lease).local_port = port
    assert reset.heard(b"data: {}\n\n")
    replica.flight.noticed(5002)
    assert replica.flight.abandoned_count == 2, "its connection stands: the line is about another one"
    replica.flight.noticed(5001)
    assert replica.flight.abandoned(1) == [silent]


async def test_the_end_of_the_instance_ends_them() -> None:
    replica = Replica(limit=2)
    p = pool(replica)
    left(replica, leased(await p.acquire()))
    replica.flight.forget(2)
    assert replica.flight.abandoned_count == 1
    replica.flight.forget(1)
    assert replica.inflight == 0


async def test_one_that_was_moved_away_is_known() -> None:
    lease = leased(await pool(Replica()).acquire())
    lease.open(POST)
    lease.abort(ExchangeError(Fault.STALLED, "no progress"))
    assert not lease.moved
    lease.abort(ExchangeError(Fault.OCCUPIED, "another one"))
    assert lease.moved


def test_when_a_reset_ends_the_work() -> None:
    def notices(data: bytes, *, one_piece: bool = False, unbatchable: bool = False) -> bool:
        return notices_reset(data, one_piece=one_piece, unbatchable=unbatchable)

    content = b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n'
    reading = b": keepalive 2048/9000\n\n"
    assert notices(content)
    assert notices(reading)
    assert notices(content, unbatchable=True)
    assert not notices(reading, unbatchable=True), "the whole prompt is read first, and nothing would tell of the end"
    assert not notices(content.replace(b"null", b'"stop"')), "its last bytes: the end follows"
    assert not notices(b"data: [DONE]\n\n")
    assert not notices(b"HTTP/1.0 200 OK\r\n\r\n{", one_piece=True)


def test_what_mlx_lm_server_batches() -> None:
    assert is_batchable({"temperature": 1}.get)
    assert not any(
        is_batchable({name: value}.get) for name, value in {"seed": 0, "draft_model": "d", "adapters": "a"}.items()
    )
    assert batches({"max-tokens": 5, "kv-bits": None})
    assert not batches({"kv-bits": 8})
    assert not batches({"draft-model": "d"})


def test_the_slowest_rate_of_the_last_answers_counts() -> None:
    pace = Pace()
    assert pace.writing(100) == 100 / SLOWEST
    pace.note(ENOUGH - 1, 1000.0)
    pace.note(100, 0.0)
    assert pace.writing(100) == 100 / SLOWEST, "too short to mean anything"
    pace.note(200, 2.0)
    pace.note(200, 10.0)
    assert pace.writing(100) == 5.0


def test_only_a_pause_that_has_ended_by_progress_is_usual() -> None:
    usual = UsualSilence()
    for quiet, heard in ((1.0, 0.0), (50.0, 0.0), (0.0, 0.0), (3.0, 0.0)):
        usual.note(quiet, heard)
    assert usual.patience == 0.0, "the one that waited has left"
    usual.note(0.5, 10.0)
    assert usual.patience == 0.0, "once is not usual"
    usual.note(2.0, 10.0)
    usual.note(0.0, 12.0)
    assert usual.patience == USUAL * 2.0
    for second in range(PAUSES):
        usual.note(0.5, 13.0 + second)
    assert usual.patience == USUAL * 0.5, "long ago"


def sent_at(flight: InFlight, at: float, tokens: int, *, engine: Engine = Engine.MLX_LM) -> Call:
    life = Life()
    life.identity.engine = engine
    lease = Lease(Replica(), life, at)
    flight.add(lease)
    call = lease.open(POST, Work(prompt_tokens=tokens))
    assert isinstance(call, Call)
    call.last_heard = 0.0
    return call


async def test_long_prompts_are_tokenised_one_after_the_other() -> None:
    flight = InFlight()
    first = sent_at(flight, 100.0, 1_000_000)
    assert flight.reading_until(1) == 200.0
    sent_at(flight, 150.0, 500_000)
    assert flight.reading_until(1) == 250.0
    sent_at(flight, 900.0, 9_000)
    assert flight.reading_until(1) == 250.0, "short prompts that keep coming do not hide a stall"
    first.last_heard = 160.0
    assert flight.reading_until(1) == 160.0 + 3 * flight.pace.step(1_000_000), "they are read together, step by step"
    flight.discard(next(lease for lease in flight.of(1) if lease.exchange is first))
    assert flight.reading_until(1) == 200.0


async def test_each_step_of_the_reading_has_its_time() -> None:
    flight = InFlight()
    call = sent_at(flight, 100.0, 32_768)
    call.last_heard = 130.0
    assert flight.reading_until(1) == 130.0 + 2 * PREFILL_STEP / READ
    (lease,) = flight.of(1)
    lease.progress = RequestProgress(decoding=True)
    assert flight.reading_until(1) == 0.0


async def test_another_server_does_not_report_that_it_reads() -> None:
    flight = InFlight()
    sent_at(flight, 100.0, 50_000, engine=Engine.OTHER)
    assert flight.reading_until(1) == 300.0


@pytest.mark.parametrize(
    ("spoke", "one_piece", "engine", "sequential"),
    [
        (NOT_BEGUN, False, Engine.MLX_LM, True),
        (NOT_BEGUN - RECENT - 0.5, False, Engine.MLX_LM, False),  # nobody gets anything: it may be reading
        (NOT_BEGUN, True, Engine.MLX_LM, False),
        (NOT_BEGUN, False, Engine.OTHER, False),
    ],
)
async def test_an_engine_is_seen_to_answer_one_after_the_other(
    *, spoke: float, one_piece: bool, engine: Engine, sequential: bool
) -> None:
    limiter = ConcurrencyLimiter(lambda: InflightLimit(8, ""), lambda: 0.0, lambda: None)
    flight = limiter.inflight
    writing = sent_at(flight, 99.0, 1)
    (lease,) = flight.of(1)
    lease.progress = RequestProgress(decoding=True)
    sent_at(flight, 100.0, 1, engine=engine)
    late = next(one for one in flight.of(1) if one is not lease)
    late.work = Work(one_piece=one_piece)
    writing.last_heard = 100.0 + spoke
    assert flight.held_up(1, 100.0 + NOT_BEGUN - 0.1) == []
    assert flight.held_up(1, 100.0 + NOT_BEGUN) == ([late] if sequential else [])
    flight.sequential = True
    assert limiter.slots == 1
    limiter.begin(slowly=False)
    assert limiter.slots == 8, "the next process may have other flags"
    limiter.close()


async def test_an_engine_is_seen_to_batch() -> None:
    flight = InFlight(batches=False)
    sent_at(flight, 1.0, 0)
    (early,) = flight.of(1)
    late = Lease(Replica(), Life(), 2.0)
    flight.add(late)
    late.completed = True
    flight.discard(late)
    assert not flight.batches, "the first one may wait behind it"
    early.progress = type(early.progress)(decoding=True)
    flight.add(late)
    flight.discard(late)
    assert flight.batches
