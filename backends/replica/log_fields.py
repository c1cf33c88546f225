"""Log line of a change of state: level and fields."""

import logging

from backends.domain.state import State
from backends.replica.lifecycle import LifecycleState


def of_change(before: LifecycleState, after: LifecycleState, now: float) -> tuple[int, dict[str, object]]:
    """Includes the failure that caused the change, if there is one."""
    failure = after.last_failure if after.last_failure is not before.last_failure else None
    fields: dict[str, object] = {
        "state": after.state.value,
        "was": before.state.value,
        "generation": after.generation,
    }
    if failure is not None:
        fields |= {"cause": failure.cause.value, "exit": failure.exit, "reason": failure.message}
    if after.state is State.BACKOFF:
        fields["retry_in"] = round(max(0.0, after.retry_at - now), 1)
    if after.crash_looping:
        fields["crash_looping"] = True
    if after.gave_up:
        fields["gave_up"] = after.gave_up
    bad = failure is not None or after.state is State.FAILED
    return logging.WARNING if bad else logging.INFO, fields
