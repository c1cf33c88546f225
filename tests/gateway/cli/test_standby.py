"""The advice of ``check`` on replicas."""

from dataclasses import replace

import pytest

from gateway.cli.standby import Standby, advice

GIB = 2**30
ONE = Standby("m", 1, 20 * GIB, 64 * GIB, backoff=1.0, load=11.0, patience=60.0)
TWO = replace(ONE, replicas=2)


def said(s: Standby) -> str:
    return "\n".join(advice(s))


def test_what_a_crash_costs_with_one_replica() -> None:
    assert said(ONE) == (
        "m: a crash of its one replica is a pause of about 12 s; requests wait for it, then their prompts are read "
        "again (the prompt cache is lost)"
    )


def test_replicas_that_cost_much_memory() -> None:
    assert said(TWO) == (
        "m: 2 replicas hold the weights 2 times (20.00 GiB each, 40.00 GiB of 64.00 GiB), and a GPU reset or a lack of "
        "memory ends them together. One replica restarts in about 12 s; requests wait for it, then their prompts are "
        "read again (the prompt cache is lost): replicas: 1 would leave 20.00 GiB for long prompts and other models"
    )


def test_a_pause_longer_than_requests_wait() -> None:
    for s in (replace(ONE, load=180.0), replace(TWO, load=180.0)):
        assert "about 3 min, longer than requests wait (60 s, the least of queue_timeout and timeouts.total)" in said(s)
        assert "requests wait for it, then" not in said(s)


def test_before_the_first_load_no_number_is_made_up() -> None:
    assert not said(replace(ONE, load=None))
    assert "is not known before its first start" in said(replace(TWO, load=None))
    assert "12 s" not in said(replace(TWO, load=None))


@pytest.mark.parametrize("weights", [0, 6 * GIB])
def test_replicas_that_cost_little_get_no_word(weights: int) -> None:
    assert not said(replace(TWO, weights=weights))
    assert said(replace(TWO, weights=7 * GIB))
    assert said(replace(TWO, weights=4 * GIB, replicas=3)), "the two beyond the first count"
