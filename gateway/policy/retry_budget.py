"""Retry budget: how many requests may be retrying at once, so that retries do not multiply an overload.

The numbers are Envoy's defaults: 20 % of the active requests, and at least 3. A retry does not count if its backend is
known to have exited: such a retry moves load and adds none.

Pure.
"""

SHARE = 0.2
MIN_RETRIES = 3


class RetryBudget:
    def __init__(self) -> None:
        self.active = 0
        self.retrying = 0
        self.refused = 0  # since the start

    def grant(self) -> bool:
        """True if a retry may begin; then ``release`` must be called at its end."""
        if self.retrying >= max(MIN_RETRIES, SHARE * self.active):
            self.refused += 1
            return False
        self.retrying += 1
        return True

    def release(self) -> None:
        self.retrying -= 1
