"""Who may have brought a backend down."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.diagnosis.suspects import LARGEST_PROMPT_CAUSES, MEMORY, RequestProgress, suspects
from backends.domain.failure import Aftermath, Blame, Cause, Failure

OTHERS = sorted(set(Cause) - LARGEST_PROMPT_CAUSES - {Cause.STALLED, Cause.KILLED})


def failed(cause: Cause, blame: Blame = Blame.BACKEND) -> Failure:
    return Failure(cause, Aftermath.EXITED, "it died", blame=blame)


def prefill(tokens: int) -> RequestProgress:
    return RequestProgress(tokens, prefilling=True)


def decode(tokens: int) -> RequestProgress:
    return RequestProgress(tokens, prefilling=True, decoding=True)


@pytest.mark.parametrize("cause", sorted(set(Cause) - {Cause.KILLED}))
def test_who_was_alone_is_the_suspect(cause: Cause) -> None:
    for progress_now in (RequestProgress(5), prefill(5), decode(5)):
        assert suspects(failed(cause), {"one": progress_now}) == {"one"}


@pytest.mark.parametrize("blame", sorted(set(Blame) - {Blame.BACKEND}))
def test_what_the_machine_or_a_person_did_is_nobodys_fault(blame: Blame) -> None:
    assert suspects(failed(Cause.OOM, blame), {"one": prefill(9)}) == frozenset()


def test_without_a_request_there_is_no_suspect() -> None:
    assert suspects(failed(Cause.OOM), {}) == frozenset()


@pytest.mark.parametrize("cause", sorted(LARGEST_PROMPT_CAUSES))
def test_memory_is_taken_by_the_largest_prompt_in_prefill(cause: Cause) -> None:
    progress_of = {"long": prefill(9000), "short": prefill(300), "late": RequestProgress(20_000), "old": decode(50_000)}
    assert suspects(failed(cause), progress_of) == {"long"}


@pytest.mark.parametrize("cause", sorted(MEMORY))
def test_if_none_reports_progress_the_largest_that_waits(cause: Cause) -> None:
    assert suspects(
        failed(cause), {"long": RequestProgress(9000), "short": RequestProgress(300), "old": decode(50_000)}
    ) == {"long"}


@pytest.mark.parametrize("cause", sorted(MEMORY))
def test_if_all_decode_only_one_that_is_most_of_it(cause: Cause) -> None:
    assert suspects(failed(cause), {"a": decode(900), "b": decode(300), "c": decode(500)}) == {"a"}
    assert suspects(failed(cause), {"a": decode(900), "b": decode(300), "c": decode(700)}) == frozenset()


@pytest.mark.parametrize("cause", OTHERS)
def test_a_crash_is_of_those_that_have_no_token_yet(cause: Cause) -> None:
    progress_of = {"new": RequestProgress(5), "reading": prefill(7), "old": decode(9)}
    assert suspects(failed(cause), progress_of) == {"new", "reading"}
    assert suspects(failed(cause), {"a": decode(5), "b": decode(7)}) == frozenset()


def test_what_comes_from_outside_strikes_whoever_is_there() -> None:
    assert suspects(failed(Cause.STALLED), {"a": RequestProgress(5), "b": decode(7)}) == frozenset()
    assert suspects(failed(Cause.KILLED), {"a": RequestProgress(5), "b": decode(7)}) == frozenset()
    assert suspects(failed(Cause.KILLED), {"a": RequestProgress(5)}) == frozenset()


@given(
    cause=st.sampled_from(Cause),
    progress_of=st.dictionaries(
        st.integers(), st.builds(RequestProgress, st.integers(0, 10**6), st.booleans(), st.booleans()), min_size=2
    ),
)
def test_what_decodes_in_company_is_accused_of_nothing_but_size(
    cause: Cause, progress_of: dict[int, RequestProgress]
) -> None:
    for key in suspects(failed(cause), progress_of):
        assert key in progress_of
        assert not progress_of[key].decoding or cause in LARGEST_PROMPT_CAUSES
