"""Values of samplers, of which mlx_lm.server compiles each new one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.kinds import Kind
from gateway.request import fit_samplers, parse
from gateway.request.fields import COLDEST
from gateway.request.sampler_values import rounded, rounded_share

TWENTIETH = 0.05 + 1e-9


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (0, 0), (1, 1), (0.7, 0.7), (0.70001, 0.7), (1.2345, 1.23), (0.1, 0.1), (0.0123, 0.012), (0.001, 0.001),
        (0.0009999, 0.001), (99.999, 100.0), (100, 100),
    ],
)  # fmt: skip
def test_a_temperature(value: float, sent: float) -> None:
    assert rounded(value) == sent


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (0, 0), (1, 1), (1.0, 1), (0.95, 0.95), (0.9, 0.9), (0.8765, 0.88), (0.9512, 0.951), (0.999, 0.999),
        (0.99987654, 0.99988), (0.004, 0.004), (0.0456, 0.046), (0.98, 0.98),
    ],
)  # fmt: skip
def test_a_share(value: float, sent: float) -> None:
    assert rounded_share(value) == sent


@given(st.floats(COLDEST, 100))
def test_a_temperature_stays_what_it_is(value: float) -> None:
    """Above 0, where it is: 0 is greedy."""
    sent = rounded(value)
    assert sent > 0
    assert abs(sent - value) <= TWENTIETH * value
    assert rounded(sent) == sent


@given(st.floats(1e-12, 1 - 1e-12, exclude_max=True))
def test_a_share_stays_what_it_is(value: float) -> None:
    """Between 0 and 1, where it is: either may switch the sampler off."""
    sent = rounded_share(value)
    assert 0 < sent < 1
    assert abs(sent - value) <= TWENTIETH * value
    assert abs(sent - value) <= 0.005 + 1e-9
    assert rounded_share(sent) == sent
    if value >= 0.9:
        assert abs(sent - value) <= TWENTIETH * (1 - value) + 1e-14


def test_there_are_few_values() -> None:
    steps = 50_000
    assert len({rounded(2 * i / steps) for i in range(steps)}) < 600
    assert len({rounded_share(i / steps) for i in range(steps)}) < 600


def test_the_request_says_what_was_changed() -> None:
    said = b'"temperature": 0.7123, "top_p": 0.95, "min_p": 0.051234, "top_k": 40, "presence_penalty": 0.12345'
    parsed = parse(b'{"messages": [{"role": "user", "content": "x"}], ' + said + b"}", Kind.CHAT)
    sent = fit_samplers(parsed)
    assert sent.normalized == ("temperature", "min_p")
    assert {name: sent.params[name] for name in ("temperature", "top_p", "min_p", "top_k", "presence_penalty")} == {
        "temperature": 0.71, "top_p": 0.95, "min_p": 0.051, "top_k": 40, "presence_penalty": 0.12345,
    }  # fmt: skip
    assert (parsed.params["temperature"], parsed.normalized) == (0.7123, ())
    assert fit_samplers(sent) is sent
