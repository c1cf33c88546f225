"""Each row of the table of ``liveness``, and the values at its edges."""

import re
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.domain.failure import HARMLESS, Cause
from backends.domain.state import Health
from backends.replica import liveness
from backends.replica.liveness import AskCanary, Condemn, Finding, Healthy, Move, Signs, assess

QUIET = Signs(
    inflight=0,
    waiting=0,
    one_piece=False,
    quiet=0.0,
    health=Health.OK,
    same_health=9,
    unanswered=0.0,
    hint=None,
    suspected=False,
    canary_failed=False,
)
BUSY = replace(QUIET, inflight=2, waiting=2)
PROGRESS = 120.0
HINTS = [cause for cause in Cause if cause not in HARMLESS]


def see(signs: Signs, *, is_mlx: bool = True, progress: float = PROGRESS) -> Finding:
    return assess(signs, progress=progress, is_mlx=is_mlx)


def condemned(finding: Finding) -> Condemn:
    assert isinstance(finding, Condemn)
    return finding


@pytest.mark.parametrize("signs", [QUIET, BUSY, replace(QUIET, health=Health.UNKNOWN)])
def test_nothing_wrong(signs: Signs) -> None:
    assert see(signs) == Healthy()


@pytest.mark.parametrize("signs", [QUIET, BUSY])
def test_health_says_503(signs: Signs) -> None:
    dead = replace(signs, health=Health.UNAVAILABLE, same_health=1)
    assert condemned(see(dead)).cause is Cause.WEDGE
    assert condemned(see(replace(dead, hint=Cause.OOM))).cause is Cause.OOM


@pytest.mark.parametrize(
    ("times", "expected"),
    [(1, Healthy), (liveness.FOREIGN_503S_TO_CONDEMN - 1, Healthy), (liveness.FOREIGN_503S_TO_CONDEMN, Condemn)],
)
def test_another_server_may_mean_busy_by_503(times: int, expected: type[Finding]) -> None:
    signs = replace(BUSY, health=Health.UNAVAILABLE, same_health=times)
    assert isinstance(see(signs, is_mlx=False), expected)
    assert isinstance(see(signs), Condemn)


@pytest.mark.parametrize("signs", [QUIET, BUSY])
@pytest.mark.parametrize("health", [Health.OK, Health.SILENT, Health.UNKNOWN])
def test_the_process_itself_tells_that_its_generation_thread_has_ended(signs: Signs, health: Health) -> None:
    """Before mlx-lm 0.32.0 /health goes on to say that all is well."""
    dead = replace(signs, health=health, thread_ended=True)
    assert condemned(see(dead)) == Condemn(Cause.WEDGE, "its generation thread has ended")
    assert condemned(see(replace(dead, hint=Cause.OOM))).cause is Cause.OOM


@pytest.mark.parametrize("signs", [QUIET, BUSY])
@pytest.mark.parametrize(
    ("times", "expected"),
    [(1, Healthy), (liveness.REFUSALS_TO_CONDEMN - 1, Healthy), (liveness.REFUSALS_TO_CONDEMN, Condemn)],
)
def test_nobody_listens(signs: Signs, times: int, expected: type[Finding]) -> None:
    assert isinstance(see(replace(signs, health=Health.REFUSED, same_health=times)), expected)


@pytest.mark.parametrize(("quiet", "expected"), [(0.0, Healthy), (119.9, Healthy), (120.0, Condemn), (9e9, Condemn)])
def test_silence_with_requests_in_flight(quiet: float, expected: type[Finding]) -> None:
    finding = see(replace(BUSY, quiet=quiet))
    assert isinstance(finding, expected)
    if isinstance(finding, Condemn):
        assert finding.cause is Cause.STALLED
        assert re.search(r"\b2\b", finding.reason)


@pytest.mark.parametrize(("quiet", "expected"), [(0.0, Healthy), (19.9, Healthy), (20.0, Condemn)])
def test_silence_is_believed_sooner_where_the_output_names_a_cause(quiet: float, expected: type[Finding]) -> None:
    finding = see(replace(BUSY, quiet=quiet, hint=Cause.GPU_TIMEOUT))
    assert isinstance(finding, expected)
    if isinstance(finding, Condemn):
        assert finding.cause is Cause.GPU_TIMEOUT


def test_an_impatient_operator_is_heard_with_and_without_a_hint() -> None:
    assert isinstance(see(replace(BUSY, quiet=5.0), progress=5.0), Condemn)
    assert isinstance(see(replace(BUSY, quiet=5.0, hint=Cause.OOM), progress=5.0), Condemn)
    assert isinstance(see(replace(QUIET, health=Health.SILENT, unanswered=5.0), progress=5.0), Condemn)
    assert see(replace(BUSY, quiet=4.9, hint=Cause.OOM), progress=5.0) == Healthy()


@pytest.mark.parametrize(("unanswered", "expected"), [(0.0, Healthy), (29.9, Healthy), (30.0, Condemn)])
def test_an_idle_one_that_does_not_answer(unanswered: float, expected: type[Finding]) -> None:
    finding = see(replace(QUIET, health=Health.SILENT, unanswered=unanswered))
    assert isinstance(finding, expected)
    if isinstance(finding, Condemn):
        assert finding.cause is Cause.STALLED


@pytest.mark.parametrize("signs", [QUIET, replace(BUSY, quiet=5.0)])
@pytest.mark.parametrize(("unanswered", "deaf"), [(0.0, False), (4.9, False), (5.0, True)])
def test_deaf_after_its_output_named_a_cause(signs: Signs, unanswered: float, deaf: bool) -> None:
    hinted = replace(signs, hint=Cause.GPU_FAULT, unanswered=unanswered)
    finding = see(replace(hinted, health=Health.SILENT))
    assert isinstance(finding, Condemn) == deaf
    if isinstance(finding, Condemn):
        assert finding.cause is Cause.GPU_FAULT
    assert not isinstance(see(replace(hinted, health=Health.OK)), Condemn)


def test_slow_to_answer_but_making_progress_is_no_wedge() -> None:
    deaf = replace(BUSY, quiet=4.9, hint=Cause.GPU_FAULT, health=Health.SILENT, unanswered=60.0)
    assert see(deaf) == Healthy()


def test_a_busy_one_may_leave_health_unanswered() -> None:
    assert see(replace(BUSY, health=Health.SILENT, unanswered=1e6, quiet=1.0)) == Healthy()


@pytest.mark.parametrize("signs", [replace(QUIET, hint=Cause.OOM), replace(QUIET, suspected=True)])
def test_a_hint_or_a_client_that_left_asks_for_the_canary(signs: Signs) -> None:
    assert see(signs) == AskCanary()
    assert see(replace(signs, inflight=1)) == Healthy(), "never probe a busy backend with work"


def test_the_canary_is_believed() -> None:
    assert condemned(see(replace(QUIET, canary_failed=True))).cause is Cause.WEDGE
    assert condemned(see(replace(QUIET, canary_failed=True, hint=Cause.OOM))).cause is Cause.OOM


def test_health_comes_before_the_canary() -> None:
    signs = replace(QUIET, hint=Cause.OOM, health=Health.REFUSED, same_health=liveness.REFUSALS_TO_CONDEMN)
    assert isinstance(see(signs), Condemn)


signs_of = partial(
    st.builds,
    Signs,
    quiet=st.floats(0, 1e6),
    health=st.sampled_from(Health),
    same_health=st.integers(1, 1000),
    unanswered=st.floats(0, 1e6),
    hint=st.sampled_from([None, *HINTS]),
    suspected=st.booleans(),
    one_piece=st.just(False),
    canary_failed=st.just(False),
)
HEARD = st.floats(0, liveness.HINTED_UNANSWERED, exclude_max=True)
NEUTRAL = st.sampled_from([Health.OK, Health.UNKNOWN, Health.SILENT])
LINE = st.sampled_from(HINTS)


@given(
    signs=signs_of(
        inflight=st.just(100),
        waiting=st.integers(1, 100),
        quiet=st.floats(0, 60),
        health=NEUTRAL,
        unanswered=HEARD,
        hint=LINE,
    ),
    progress=st.floats(0.1, 3600),
    is_mlx=st.booleans(),
)
def test_text_alone_condemns_nobody_whose_requests_progress(signs: Signs, progress: float, is_mlx: bool) -> None:
    silent = signs.quiet >= min(progress, liveness.HINTED_SILENCE)
    assert isinstance(see(signs, progress=progress, is_mlx=is_mlx), Condemn if silent else Healthy)


@given(
    signs=signs_of(inflight=st.just(0), waiting=st.just(0), quiet=st.just(0.0), health=st.just(Health.OK), hint=LINE)
)
def test_text_alone_condemns_nobody_who_is_idle_and_answers(signs: Signs) -> None:
    assert see(signs) == AskCanary()


@given(signs=signs_of(inflight=st.just(100), waiting=st.integers(1, 100)), is_mlx=st.booleans())
def test_a_busy_one_is_never_asked_for_more_work(signs: Signs, is_mlx: bool) -> None:
    assert not isinstance(see(signs, is_mlx=is_mlx), AskCanary)


def test_who_can_have_heard_nothing_yet_proves_no_stall() -> None:
    in_one_piece = replace(BUSY, one_piece=True, quiet=9e9)
    assert see(in_one_piece) == Healthy(), "an answer in one piece comes at the end, however long that takes"
    assert condemned(see(replace(in_one_piece, hint=Cause.OOM))).cause is Cause.OOM
    assert condemned(see(replace(in_one_piece, health=Health.UNAVAILABLE))).cause is Cause.WEDGE


def test_a_silence_that_an_abandoned_request_explains_is_not_the_servers() -> None:
    silent = replace(BUSY, quiet=PROGRESS)
    assert condemned(see(silent)).cause is Cause.STALLED
    assert see(replace(silent, occupied=True)) == Move()
    assert see(replace(silent, occupied=True, hint=Cause.OOM)) == Move(), "text alone condemns nobody"
    assert see(replace(BUSY, occupied=True)) == Healthy()
    dead = replace(silent, occupied=True, health=Health.UNAVAILABLE)
    assert condemned(see(dead)).cause is Cause.WEDGE


def test_what_should_have_ended_makes_us_ask_for_a_token() -> None:
    assert see(replace(BUSY, one_piece=True, overdue=True)) == AskCanary()
    assert see(replace(QUIET, unproven=True)) == AskCanary()
    assert see(replace(BUSY, unproven=True)) == Healthy()
