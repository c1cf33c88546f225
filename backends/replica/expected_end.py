"""When the work on a request should have ended of which nothing shows that it goes on: an answer in one piece, and an
abandoned request."""

from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.diagnosis.log_parser import LogParser

RESET_TOLD = 3.0  # seconds from a failed write of mlx_lm.server until its log has told us
TAKEN_IN = 1.0  # seconds until a request whose prompt is in tokens is a member of the batch


class ExpectedEnd:
    """Of the requests on one instance. ``progress``: ``timeouts.progress``; ``log``: of its process, None for a remote
    server."""

    def __init__(self, inflight: InFlight, progress: float, log: LogParser | None) -> None:
        self._inflight = inflight
        self._pace = inflight.pace
        self._progress = progress
        self._log = log
        self._idle_at = 0.0  # event loop time at which the process last told that its batch has no members

    def told_idle(self, now: float) -> None:
        """The process tells that its batch has no members."""
        self._idle_at = now

    def allowance(self, lease: Lease) -> float:
        """Seconds after which a request that shows no progress should have ended."""
        work = lease.work
        return self._progress + self._pace.reading(work.prompt_tokens) + self._pace.writing(work.max_tokens)

    def may_withhold(self, lease: Lease, now: float) -> bool:
        """The answer has begun, and may be a tool call that is sent when it is whole."""
        if not (lease.work.tools and lease.progress.begun):
            return False
        members = len(self._inflight.at_work(lease.generation))
        slowly = self._progress + self._inflight.rhythm.writing(lease.work.max_tokens, members)
        return now - lease.admitted < max(slowly, self.allowance(lease))

    def is_late(self, lease: Lease, now: float) -> bool:
        """The work on a request should have ended."""
        return now - lease.admitted >= self.allowance(lease)

    def is_unproven(self, lease: Lease, now: float) -> bool:
        """Only an answer to a later request can tell that an abandoned one is over."""
        log = self._log
        logged = log is not None and log.shows_requests and not lease.unbatchable  # the reset, once it is noticed
        awaited = logged and now < lease.hung_up_at + self._noticed_within(lease) and not self._has_left(lease)
        return self.is_late(lease, now) or (lease.hung_up_at > 0 and not awaited)

    def _has_left(self, lease: Lease) -> bool:
        """The batch had no members when this one should have been in it, so that nothing is to be written for it."""
        return self._idle_at >= lease.hung_up_at + TAKEN_IN + self._pace.tokenising(lease.prompt_tokens)

    def _noticed_within(self, lease: Lease) -> float:
        """Seconds from a reset to the server's next write, which fails and is told in its log. Where nothing is told by
        then, it had written its last before the reset."""
        work = lease.work
        silent = self._pace.writing(work.max_tokens) if work.tools else 0.0
        return RESET_TOLD + silent + (0.0 if lease.progress.decoding else self._pace.reading(work.prompt_tokens))
