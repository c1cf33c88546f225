"""Failures with one common cause, and shortages of one memory."""

from dataclasses import replace

from backends.diagnosis.incidents import SAME_SHORTAGE_SECONDS, Incidents
from backends.domain.failure import Aftermath, Cause, Failure

ONE = Failure(Cause.OOM, Aftermath.EXITED, "it ran out of memory", backend="m:0")
OTHER = replace(ONE, backend="m:1")


def test_replicas_that_run_out_of_memory_within_a_moment_had_it_together() -> None:
    incidents = Incidents()
    assert not incidents.is_part_of_a_shortage(ONE, 10.0, began=5.0)
    assert not incidents.is_part_of_a_shortage(ONE, 10.1, began=5.0), "its own"
    assert incidents.is_part_of_a_shortage(OTHER, 10.2, began=5.0)
    late = 10.1 + SAME_SHORTAGE_SECONDS
    assert not incidents.is_part_of_a_shortage(OTHER, late, began=5.0)
    assert not incidents.is_part_of_a_shortage(replace(ONE, cause=Cause.NATIVE_CRASH), late, began=5.0)


def test_what_a_replica_held_that_ended_before_the_request_began_was_free_again() -> None:
    incidents = Incidents()
    incidents.is_part_of_a_shortage(ONE, 10.0, began=5.0)
    assert not incidents.is_part_of_a_shortage(OTHER, 10.5, began=10.1)
