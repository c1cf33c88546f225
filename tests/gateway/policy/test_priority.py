"""The class of a request, from its model and its header."""

import pytest

from backends.domain.priority import Priority
from gateway.api.errors import RequestError
from gateway.policy.priority import priority_of

INTERACTIVE, AGENT, BACKGROUND = Priority


@pytest.mark.parametrize(
    ("header", "model", "priority"),
    [
        (b"", INTERACTIVE, INTERACTIVE),
        (b"", BACKGROUND, BACKGROUND),
        (b"background", INTERACTIVE, BACKGROUND),
        (b" Agent ", INTERACTIVE, AGENT),
        (b"agent", AGENT, AGENT),
        (b"background", AGENT, BACKGROUND),
    ],
)
def test_the_header_lowers_the_class_of_the_model(header: bytes, model: Priority, priority: Priority) -> None:
    assert priority_of(header, model) == (priority, "")


def test_it_does_not_raise_it_and_says_so() -> None:
    priority, warning = priority_of(b"interactive", AGENT)
    assert priority is AGENT
    assert "interactive" in warning
    assert "agent" in warning


@pytest.mark.parametrize("header", [b"urgent", b"1", b"\xff", b"background, agent", b"x" * 5000, b"__class__"])
def test_an_unknown_class_is_refused(header: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        priority_of(header, INTERACTIVE)
    error = refused.value.error
    assert (error.status, error.param) == (400, "x-priority")
    assert "interactive, agent, background" in error.message
    assert len(error.message) < 300
