"""Failures with one common cause: a GPU reset hits every process on the GPU.

The first replica to report it has a failure of its own. Reports of other replicas within SAME_INCIDENT_SECONDS do not
count as failures of theirs: no replica is given up for a shared incident. Replicas that share memory run out of it
together: neither had it to itself.

Pure: no I/O, no clock.
"""

from backends.diagnosis.suspects import MEMORY
from backends.domain.failure import Cause, Failure

SHARED_CAUSES = frozenset({Cause.GPU_VICTIM, Cause.GPU_TIMEOUT, Cause.GPU_FAULT})
SAME_INCIDENT_SECONDS = 10.0
SAME_SHORTAGE_SECONDS = 1.0  # seen on a GPU: 10 ms; a death is noticed within a second


class Incidents:
    """The shared incidents of one machine."""

    def __init__(self) -> None:
        self._backend = ""
        self._at = 0.0
        self._ran_out: dict[str, float] = {}  # replica -> when

    def is_part_of_another(self, failure: Failure, now: float) -> bool:
        """Whether another replica has reported the incident; otherwise the failure may begin a new one."""
        if failure.cause not in SHARED_CAUSES:
            return False
        if self._backend and now - self._at < SAME_INCIDENT_SECONDS:
            return failure.backend != self._backend
        self._backend, self._at = failure.backend, now
        return False

    def is_part_of_a_shortage(self, failure: Failure, now: float, *, began: float) -> bool:
        """Whether memory ran out, and another replica ran out of it at the same time. ``began``: when the first of the
        requests in flight did; what another one held before that was free again."""
        if failure.cause not in MEMORY:
            return False
        self._ran_out[failure.backend] = now
        others = (at for backend, at in self._ran_out.items() if backend != failure.backend)
        return any(at >= began and now - at < SAME_SHORTAGE_SECONDS for at in others)
