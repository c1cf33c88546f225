"""Who may have brought a backend down."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.diagnosis.suspects import LARGEST_PROMPT_CAUSES, MEMORY, RequestProgress, suspects
from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.mlx_server import PREFILL_STEP

OTHERS = sorted(set(Cause) - LARGEST_PROMPT_CAUSES - {Cause.STALLED, Cause.KILLED})


def failed(cause: Cause, blame: Blame = Blame.BACKEND) -> Failure:
    return Failure(cause, Aftermath.EXITED, "it died", blame=blame)


def prefill(tokens: int, read: int = PREFILL_STEP) -> RequestProgress:
    return RequestProgress(tokens, prefilling=True, read=read)


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
    progress_of = {"long": prefill(9000), "short": prefill(300), "late": RequestProgress(200), "old": decode(500)}
    assert suspects(failed(cause), progress_of) == {"long"}


def test_a_longer_one_that_was_to_be_read_next_does_not_come_back_with_the_bystanders() -> None:
    progress_of = {"long": prefill(9000), "short": prefill(300), "late": RequestProgress(20_000), "old": decode(500)}
    assert suspects(failed(Cause.OOM), progress_of) == {"long", "late"}


@pytest.mark.parametrize("cause", sorted(LARGEST_PROMPT_CAUSES))
@pytest.mark.parametrize("read", [RequestProgress, prefill])
def test_prompts_of_about_one_size_are_a_crowd(cause: Cause, read: Callable[[int], RequestProgress]) -> None:
    """Seen on a GPU: of six, one was the suspect, and the other five would have run out of memory together again."""
    prompts = {f"p{i}": read(58_000 + i) for i in range(6)}
    assert suspects(failed(cause), prompts | {f"d{i}": decode(40) for i in range(6)}) == set(prompts)


def test_those_that_come_back_together_are_short_and_need_half_of_what_was_read() -> None:
    """A batch is padded to its longest."""
    prompts = {f"p{tokens}": prefill(tokens) for tokens in (10_000, 8000, 6000, 4000, 1200, 1000, 900)}
    assert suspects(failed(Cause.OOM), prompts) == {"p10000", "p8000", "p6000", "p4000"}
    prompts |= {f"d{i}": decode(2000) for i in range(6)}
    assert suspects(failed(Cause.OOM), prompts) == {"p10000", "p8000", "p6000", "p4000"}
    prompts |= {f"d{i}": decode(3000) for i in range(6)}
    assert suspects(failed(Cause.OOM), prompts) == {"p10000", "p8000", "p6000", "p4000", "p1200"}


def test_one_that_is_many_times_too_large_says_little_of_what_fits() -> None:
    """Seen with mlx_lm.server: beside one of 20 000, six of 2000 came back together, and ran out of memory again."""
    prompts = {f"p{i}": RequestProgress(2000 + i) for i in range(6)} | {"giant": RequestProgress(20_000)}
    decoding = {f"d{i}": decode(8) for i in range(3)}
    assert suspects(failed(Cause.OOM), prompts | decoding) == set(prompts) - {"p0", "p1"}
    further = prompts | {"giant": prefill(20_000, read=12_000)}
    assert suspects(failed(Cause.OOM), further | decoding) == {"giant"}, "it had been read that far beside them"


def test_beside_a_long_answer_each_one_is_as_long() -> None:
    short = {f"s{i}": prefill(100) for i in range(7)}
    assert len(suspects(failed(Cause.OOM), short | {"long": decode(50_000)})) == 4


def test_many_short_ones_beside_a_long_one_are_not_run_one_by_one() -> None:
    """The server reads eight at a time."""
    short = {f"s{i}": prefill(1000) for i in range(60)}
    assert suspects(failed(Cause.OOM), short | {"long": prefill(50_000)}) == {"long"}
    assert suspects(failed(Cause.OOM), short) == set(short), "without it, all are of one size"


@pytest.mark.parametrize("cause", sorted(MEMORY))
def test_if_none_reports_progress_the_largest_that_waits(cause: Cause) -> None:
    assert suspects(
        failed(cause), {"long": RequestProgress(9000), "short": RequestProgress(300), "old": decode(500)}
    ) == {"long"}


@pytest.mark.parametrize("cause", sorted(MEMORY))
def test_if_all_decode_half_of_the_batch_comes_back_at_once(cause: Cause) -> None:
    assert suspects(failed(cause), {"a": decode(900), "b": decode(300), "c": decode(500)}) == {"a"}
    assert suspects(failed(cause), {"a": decode(900), "b": decode(300), "c": decode(700)}) == {"a", "c"}
    equals = {key: decode(900) for key in "abcdef"}
    assert len(suspects(failed(cause), equals)) == 3


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


@given(
    cause=st.sampled_from(sorted(LARGEST_PROMPT_CAUSES)),
    progress_of=st.dictionaries(
        st.integers(),
        st.builds(
            RequestProgress, st.integers(0, 10**6), st.booleans(), st.booleans(), st.just(True), st.integers(0, 10**6)
        ),
        min_size=2,
    ),
)
def test_somebody_is_a_suspect_of_a_shortage_unless_all_are_empty(
    cause: Cause, progress_of: dict[int, RequestProgress]
) -> None:
    accused = suspects(failed(cause), progress_of)
    undecided = {key: one for key, one in progress_of.items() if not one.decoding} or progress_of
    most = max(one.tokens for one in undecided.values())
    if any(one.tokens for one in progress_of.values()):
        assert any(undecided[key].tokens == most for key in accused)
