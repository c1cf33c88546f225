"""Each row of the table of vigil, and the values at its edges."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import vigil
from backends.failure import HARMLESS, Cause
from backends.verdict import Health
from backends.vigil import AskCanary, Condemn, Finding, Signs, Well, look

QUIET = Signs(
    inflight=0,
    quiet=0.0,
    health=Health.OK,
    same_health=9,
    unanswered=0.0,
    hint=None,
    suspected=False,
    canary_failed=False,
)
BUSY = replace(QUIET, inflight=2)
PROGRESS = 120.0
HINTS = [cause for cause in Cause if cause not in HARMLESS]


def see(signs: Signs, *, is_mlx: bool = True, progress: float = PROGRESS) -> Finding:
    return look(signs, progress=progress, is_mlx=is_mlx)


def condemned(finding: Finding) -> Condemn:
    assert isinstance(finding, Condemn)
    return finding


@pytest.mark.parametrize("signs", [QUIET, BUSY, replace(QUIET, health=Health.UNKNOWN)])
def test_nothing_wrong(signs: Signs) -> None:
    assert see(signs) == Well()


@pytest.mark.parametrize("signs", [QUIET, BUSY])
def test_health_says_503(signs: Signs) -> None:
    dead = replace(signs, health=Health.UNAVAILABLE, same_health=1)
    assert condemned(see(dead)).cause is Cause.WEDGE
    assert condemned(see(replace(dead, hint=Cause.OOM))).cause is Cause.OOM


@pytest.mark.parametrize(("times", "expected"), [(1, Well), (vigil.BUSY_503 - 1, Well), (vigil.BUSY_503, Condemn)])
def test_another_server_may_mean_busy_by_503(times: int, expected: type[Finding]) -> None:
    signs = replace(BUSY, health=Health.UNAVAILABLE, same_health=times)
    assert isinstance(see(signs, is_mlx=False), expected)
    assert isinstance(see(signs), Condemn)


@pytest.mark.parametrize("signs", [QUIET, BUSY])
@pytest.mark.parametrize(("times", "expected"), [(1, Well), (vigil.GONE_AFTER - 1, Well), (vigil.GONE_AFTER, Condemn)])
def test_nobody_listens(signs: Signs, times: int, expected: type[Finding]) -> None:
    assert isinstance(see(replace(signs, health=Health.REFUSED, same_health=times)), expected)


@pytest.mark.parametrize(("quiet", "expected"), [(0.0, Well), (119.9, Well), (120.0, Condemn), (9e9, Condemn)])
def test_silence_with_requests_in_flight(quiet: float, expected: type[Finding]) -> None:
    finding = see(replace(BUSY, quiet=quiet))
    assert isinstance(finding, expected)
    if isinstance(finding, Condemn):
        assert finding.cause is Cause.STALLED
        assert "2 requests" in finding.reason


@pytest.mark.parametrize(("quiet", "expected"), [(0.0, Well), (19.9, Well), (20.0, Condemn)])
def test_silence_is_believed_sooner_where_the_output_names_a_cause(quiet: float, expected: type[Finding]) -> None:
    finding = see(replace(BUSY, quiet=quiet, hint=Cause.GPU_TIMEOUT))
    assert isinstance(finding, expected)
    if isinstance(finding, Condemn):
        assert finding.cause is Cause.GPU_TIMEOUT


def test_an_impatient_operator_is_heard_with_and_without_a_hint() -> None:
    assert isinstance(see(replace(BUSY, quiet=5.0), progress=5.0), Condemn)
    assert isinstance(see(replace(BUSY, quiet=5.0, hint=Cause.OOM), progress=5.0), Condemn)
    assert isinstance(see(replace(QUIET, health=Health.SILENT, unanswered=5.0), progress=5.0), Condemn)
    assert see(replace(BUSY, quiet=4.9, hint=Cause.OOM), progress=5.0) == Well()


@pytest.mark.parametrize(("unanswered", "expected"), [(0.0, Well), (29.9, Well), (30.0, Condemn)])
def test_an_idle_one_that_does_not_answer(unanswered: float, expected: type[Finding]) -> None:
    finding = see(replace(QUIET, health=Health.SILENT, unanswered=unanswered))
    assert isinstance(finding, expected)
    if isinstance(finding, Condemn):
        assert finding.cause is Cause.STALLED


def test_a_busy_one_may_leave_health_unanswered() -> None:
    assert see(replace(BUSY, health=Health.SILENT, unanswered=1e6, quiet=1.0)) == Well()


@pytest.mark.parametrize("signs", [replace(QUIET, hint=Cause.OOM), replace(QUIET, suspected=True)])
def test_a_hint_or_a_client_that_left_asks_for_the_canary(signs: Signs) -> None:
    assert see(signs) == AskCanary()
    assert see(replace(signs, inflight=1)) == Well(), "never probe a busy backend with work"


def test_the_canary_is_believed() -> None:
    assert condemned(see(replace(QUIET, canary_failed=True))).cause is Cause.WEDGE
    assert condemned(see(replace(QUIET, canary_failed=True, hint=Cause.OOM))).cause is Cause.OOM


def test_health_comes_before_the_canary() -> None:
    signs = replace(QUIET, hint=Cause.OOM, health=Health.REFUSED, same_health=vigil.GONE_AFTER)
    assert isinstance(see(signs), Condemn)


@given(
    hint=st.sampled_from(HINTS),
    inflight=st.integers(1, 100),
    progress=st.floats(0.1, 3600),
    share=st.floats(0, 1, exclude_max=True),
    health=st.sampled_from([Health.OK, Health.UNKNOWN, Health.SILENT]),
    same_health=st.integers(1, 1000),
    unanswered=st.floats(0, 1e6),
    suspected=st.booleans(),
    is_mlx=st.booleans(),
)
def test_text_alone_condemns_nobody_whose_requests_progress(
    hint: Cause,
    inflight: int,
    progress: float,
    share: float,
    health: Health,
    same_health: int,
    unanswered: float,
    suspected: bool,
    is_mlx: bool,
) -> None:
    quiet = share * min(progress, vigil.HINTED_SILENCE)
    signs = Signs(inflight, quiet, health, same_health, unanswered, hint, suspected, canary_failed=False)
    if quiet < min(progress, vigil.HINTED_SILENCE):  # the product may round up to the bound
        assert look(signs, progress=progress, is_mlx=is_mlx) == Well()


@given(hint=st.sampled_from(HINTS), suspected=st.booleans(), is_mlx=st.booleans())
def test_text_alone_condemns_nobody_who_is_idle_and_answers(hint: Cause, suspected: bool, is_mlx: bool) -> None:
    assert see(replace(QUIET, hint=hint, suspected=suspected), is_mlx=is_mlx) == AskCanary()


@given(
    inflight=st.integers(1, 100),
    quiet=st.floats(0, 1e6),
    health=st.sampled_from(Health),
    same_health=st.integers(1, 100),
    hint=st.sampled_from([None, *HINTS]),
    suspected=st.booleans(),
)
def test_a_busy_one_is_never_asked_for_more_work(
    inflight: int, quiet: float, health: Health, same_health: int, hint: Cause | None, suspected: bool
) -> None:
    signs = Signs(inflight, quiet, health, same_health, quiet, hint, suspected, canary_failed=False)
    assert not isinstance(see(signs), AskCanary)
