"""One process: what its end, and its condemnation, are taken to mean."""

import pytest

from backends.domain.failure import Aftermath, Blame, Cause
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import Health
from backends.replica.instance import LOG_WINDOW, Instance
from backends.replica.liveness import Condemn
from tests.lives import MODEL, instance, scripted

METAL = "[METAL] Command buffer execution failed: "
OOM = f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
DIED = f"2026-11-22 17:30:00,000 - ERROR - mlx_lm.server generation thread died: {OOM}"


def instance_with(*lines: str) -> Instance:
    one = instance(scripted(), BackendSpec("a:0", "a", 0, MODEL, Launch(())), generation=3)
    for line in lines:
        one.log.feed(line)
    return one


def test_a_cause_that_was_named_long_ago_is_forgotten() -> None:
    one = instance_with(OOM, *["all is well"] * LOG_WINDOW)
    assert one.of_exit(-6).cause is Cause.NATIVE_CRASH


# -- its end -----------------------------------------------------------------------------------------------------------


def test_our_own_stop_is_nobodys_failure() -> None:
    one = instance_with(OOM)
    one.asked_to_stop = True
    failure = one.of_exit(-15)
    assert (failure.cause, failure.blame, failure.exit) == (Cause.NONE, Blame.GATEWAY, -15)
    assert (failure.backend, failure.generation) == ("a:0", 3)


@pytest.mark.parametrize(
    ("returncode", "lines", "more", "cause"),
    [
        (-6, [OOM], {}, Cause.OOM),
        (-9, [], {}, Cause.KILLED),
        (-9, [], {"short": True}, Cause.OOM),
        (-11, [], {}, Cause.NATIVE_CRASH),
        (-11, ['  File "x/mlx_lm/generate.py", line 9 in step'], {"limited": True}, Cause.OOM),
        (1, ["Traceback (most recent call last):", "ValueError: no"], {}, Cause.LOAD_FAILURE),
        (0, [], {}, Cause.NATIVE_CRASH),
        (-15, ["some line"], {}, Cause.KILLED),
        (-2, [], {}, Cause.KILLED),
        (3, [], {}, Cause.NATIVE_CRASH),
    ],
)
def test_what_an_exit_means(returncode: int, lines: list[str], more: dict[str, bool], cause: Cause) -> None:
    one = instance_with(*lines)
    for name, value in more.items():
        setattr(one.memory, name, value)
    failure = one.of_exit(returncode)
    assert (failure.cause, failure.aftermath, failure.exit) == (cause, Aftermath.EXITED, returncode)
    assert failure.message.startswith("a:0 died: ")
    assert (failure.backend, failure.generation) == ("a:0", 3)


def test_an_end_that_nobody_asked_for_says_so() -> None:
    assert "exited with status 0 although it was not asked to stop" in instance_with().of_exit(0).message
    assert "exited by itself with status 3" in instance_with().of_exit(3).message
    assert "terminated from outside (SIGTERM)" in instance_with().of_exit(-15).message


def test_the_output_explains_a_condemnation_only_where_it_names_the_same() -> None:
    one = instance_with(DIED)
    one.monitor.note_health(Health.UNAVAILABLE)
    same = one.of_condemned(Condemn(Cause.OOM, "its generation thread is dead"))
    assert (same.cause, same.aftermath, same.evidence) == (Cause.OOM, Aftermath.WEDGED, (DIED.split(" - ")[2],))
    assert same.message.startswith("a:0 is being replaced: its generation thread is dead (")
    other = one.of_condemned(Condemn(Cause.STALLED, "it made no progress"))
    assert (other.cause, other.blame, other.evidence) == (Cause.STALLED, Blame.BACKEND, ())
    assert other.message == "a:0 is being replaced: it made no progress"


def test_what_was_printed_before_it_was_ready_explains_no_condemnation() -> None:
    one = instance_with(OOM)
    one.monitor.begin()
    assert one.of_condemned(Condemn(Cause.OOM, "it went silent")).evidence == ()
    one.log.feed(DIED)
    assert one.of_condemned(Condemn(Cause.OOM, "it went silent")).evidence != ()


@pytest.mark.parametrize(("ready", "cause"), [(False, Cause.LOAD_FAILURE), (True, Cause.NATIVE_CRASH)])
def test_a_process_that_was_ready_did_not_fail_to_load(ready: bool, cause: Cause) -> None:
    """Also where it had printed nothing until then."""
    one = instance_with()
    if ready:
        one.monitor.begin()
    one.log.feed('127.0.0.1 - - [03/Oct/2026 09:14:07] "POST /v1/chat/completions HTTP/1.1" 200 -')
    assert one.of_exit(1).cause is cause
