"""Failures with one common cause: a GPU reset hits every process on the GPU.

The first replica to report it has a failure of its own. Reports of other replicas within SAME_INCIDENT_SECONDS do not
count as failures of theirs: no replica is given up for a shared incident, and their restarts wait until the GPU has
recovered.

Pure: no I/O, no clock.
"""

from backends.domain.failure import Cause, Failure

SHARED_CAUSES = frozenset({Cause.GPU_VICTIM, Cause.GPU_TIMEOUT, Cause.GPU_FAULT})
SAME_INCIDENT_SECONDS = 10.0


class Incidents:
    """The shared incidents of one machine."""

    def __init__(self) -> None:
        self._backend = ""
        self._at = 0.0

    def is_part_of_another(self, failure: Failure, now: float) -> bool:
        """Whether another replica has reported the incident; otherwise the failure may begin a new one."""
        if failure.cause not in SHARED_CAUSES:
            return False
        if self._backend and now - self._at < SAME_INCIDENT_SECONDS:
            return failure.backend != self._backend
        self._backend, self._at = failure.backend, now
        return False
