"""The members of a batch, corrected by what the engine tells: never less than the gateway knows, never less than the
engine holds."""

from hypothesis import given, settings
from hypothesis import strategies as st

from backends.admission.batch import Member
from backends.admission.engine_view import corrected
from backends.domain.report import EngineReport

members = st.lists(st.builds(Member, st.integers(1, 9000), st.integers(0, 900), decoding=st.booleans()), max_size=6)
reports = st.builds(
    lambda reading, decoding, longest: EngineReport(0, 0, 0, reading=reading, decoding=decoding, longest=longest),
    st.none() | st.integers(0, 5),
    st.none() | st.integers(0, 5),
    st.none() | st.integers(0, 20_000),
)


@given(members, reports)
@settings(max_examples=200)
def test_never_less(ours: list[Member], told: EngineReport) -> None:
    found = corrected(ours, told)
    assert len(found) >= len(ours)
    for before, after in zip(ours, found, strict=False):
        assert (after.prompt, after.written) >= (before.prompt, before.written)
    if told.reading is not None and told.decoding is not None and told.longest:
        assert len(found) >= told.reading + told.decoding
        if found:
            assert max(each.prompt + each.written for each in found) >= told.longest


def test_nothing_told_changes_nothing() -> None:
    ours = [Member(100, 10)]
    assert corrected(ours, None) == corrected(ours, EngineReport(0, 0, 0)) == ours
    assert corrected(ours, EngineReport(0, 0, 0, reading=0, decoding=0, longest=0)) == ours
