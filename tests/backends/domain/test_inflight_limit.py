"""How many requests may be in flight on a replica, and why."""

from dataclasses import replace

import pytest

from backends.domain.engine import Engine
from backends.domain.inflight_limit import UNBOUNDED, inflight_limits
from backends.domain.spec import BackendSpec, EngineBatch, Launch, Remote
from backends.mlx_server import concurrency

OURS = BackendSpec("m:0", "m", 0, "default_model", Launch(()), max_inflight=None, engine_batch=EngineBatch(32, 8))
COMMAND = replace(OURS, engine=Engine.OTHER, batches=False, engine_batch=None)
REMOTE = replace(COMMAND, target=Remote("http://studio.local"))


def test_auto_is_what_the_engine_takes_at_once_where_memory_bounds_the_rest() -> None:
    limits = inflight_limits(OURS)
    assert (limits.by_memory.requests, limits.by_memory.unread, limits.most) == (32, 8, 32)
    assert (limits.usual.requests, limits.usual.unread) == (UNBOUNDED, None)
    assert "not known" in limits.usual.why


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (replace(OURS, admission=False), "admission by memory is off"),
        (COMMAND, "is not known"),
        (replace(COMMAND, admission=False), "admission by memory is off"),
        (REMOTE, "a server elsewhere"),
    ],
)
def test_auto_is_eight_where_nothing_else_would_bound_the_memory(spec: BackendSpec, why: str) -> None:
    limits = inflight_limits(spec)
    assert limits.usual == limits.by_memory
    assert (limits.usual.requests, limits.usual.unread, limits.most) == (8, None, 8)
    assert why in limits.usual.why


@pytest.mark.parametrize("spec", [OURS, COMMAND, REMOTE, replace(OURS, admission=False)])
def test_who_writes_a_number_gets_it(spec: BackendSpec) -> None:
    limits = inflight_limits(replace(spec, max_inflight=100))
    assert limits.usual == limits.by_memory
    assert (limits.usual.requests, limits.usual.unread, limits.usual.why) == (100, None, "as configured")


def test_a_server_that_does_not_batch_gets_one() -> None:
    for written in (None, 100):
        assert inflight_limits(replace(OURS, batches=False, max_inflight=written)).most == 1


@pytest.mark.parametrize(
    ("flags", "members", "prompts"),
    [
        ({}, 32, 8),
        ({"decode-concurrency": None, "prompt-concurrency": None}, 32, 8),
        ({"decode-concurrency": 4}, 4, 4),
        ({"decode-concurrency": 64}, 64, 8),
        ({"prompt-concurrency": 1}, 32, 1),
        ({"prompt-concurrency": 48}, 48, 48),
        ({"decode-concurrency": 2, "prompt-concurrency": 6}, 6, 6),
    ],
)
def test_what_the_engine_takes_at_once(flags: dict[str, object], members: int, prompts: int) -> None:
    """``BatchGenerator`` makes the first of the two as large as the second at least."""
    assert concurrency(flags) == (members, prompts)
    few = inflight_limits(replace(OURS, engine_batch=EngineBatch(members, prompts)))
    assert few.by_memory.requests == members
    assert few.usual.requests == min(UNBOUNDED, members)
