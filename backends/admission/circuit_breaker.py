"""Circuit breaker of one replica that runs and fails its requests.

    CLOSED -- three failures in a row, or half of the last -->  OPEN -- a token came, and the time is over --> CLOSED
              minute's (six at least)                                   (while none comes: replaced)

A process that has exited needs no breaker. The breaker counts resets, cut answers and 5xx of a process that runs on; a
failure caused by the client or by the request itself is not counted. Each opening lasts twice as long as the last one,
until the breaker has stayed closed for ``FORGIVEN_AFTER``.

Pure: time comes in as an argument.
"""

import math
from collections import deque
from dataclasses import dataclass

from backends.domain.failure import Aftermath, Blame, CallFailure, Reason, Sent

IN_A_ROW = 3
SHARE = 0.5
AT_LEAST = 6  # outcomes within WINDOW, for SHARE to mean anything
WINDOW = 60.0  # seconds
FIRST = 5.0  # seconds
LONGEST = 120.0
FORGIVEN_AFTER = 120.0  # seconds without opening


def against(failure: CallFailure) -> bool:
    """Whether a failed request counts against its replica, not against its client or itself. The end of a process is
    counted by the restart policy."""
    verdict, said = failure.verdict, failure.upstream
    if verdict.aftermath is Aftermath.EXITED or verdict.blame is not Blame.BACKEND or said.no_retry:
        return False
    answered = verdict.reason is Reason.BUSY or said.code is not None
    return not (answered and failure.sent is Sent.NOTHING)  # "busy" is an answer


@dataclass(slots=True)
class _Second:
    """What came out of the requests that ended within it."""

    at: int
    requests: int = 0
    failures: int = 0


class _Window:
    """Counts over the last WINDOW seconds, kept by the second: a busy backend ends thousands of requests in it, and
    each of them asks."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque()
        self.requests = self.failures = 0

    def add(self, now: float, *, ok: bool) -> None:
        second = math.floor(now)
        while self._seconds and now - self._seconds[0].at >= WINDOW:
            gone = self._seconds.popleft()
            self.requests -= gone.requests
            self.failures -= gone.failures
        if not self._seconds or self._seconds[-1].at != second:
            self._seconds.append(_Second(second))
        latest = self._seconds[-1]
        latest.requests += 1
        latest.failures += not ok
        self.requests += 1
        self.failures += not ok


class CircuitBreaker:
    def __init__(self) -> None:
        self.opened = 0  # times, since the start
        self.reason = ""
        self._window = _Window()
        self._streak: deque[float] = deque(maxlen=IN_A_ROW)  # when the latest failures were, none answered since
        self._until = 0.0
        self._proved = True
        self._lasts = FIRST
        self._opened_at = -math.inf

    def closed(self, now: float) -> bool:
        return self._proved and now >= self._until

    def left(self, now: float) -> float:
        """Seconds for which it stays open in any case."""
        return max(0.0, self._until - now)

    def record(self, now: float, *, ok: bool) -> bool:
        """True: this outcome has opened it."""
        if not self.closed(now):
            return False
        self._window.add(now, ok=ok)
        if ok:
            self._streak.clear()
            return False
        self._streak.append(now)
        if not self._too_many(now):
            return False
        self._lasts = min(LONGEST, 2 * self._lasts) if now - self._opened_at < FORGIVEN_AFTER + self._lasts else FIRST
        self._opened_at, self._until, self._proved = now, now + self._lasts, False
        self.reason = f"{self._window.failures} of its last {self._window.requests} requests failed though it runs"
        self._window = _Window()
        self._streak.clear()
        self.opened += 1
        return True

    def probe_succeeded(self) -> None:
        """A token came."""
        self._proved = True

    def _too_many(self, now: float) -> bool:
        if len(self._streak) == IN_A_ROW and now - self._streak[0] < WINDOW:
            return True
        return self._window.requests >= AT_LEAST and self._window.failures >= SHARE * self._window.requests
