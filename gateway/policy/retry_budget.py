"""How many requests may be on their second try at once: retries must not multiply what is too much already.

The numbers are Envoy's: 20 % of the requests under way, and at least 3. What does not count is a request whose backend
is known to be gone: it does not add to anybody's load, it only moves there.

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
        """To be given back with ``release``."""
        if self.retrying >= max(MIN_RETRIES, SHARE * self.active):
            self.refused += 1
            return False
        self.retrying += 1
        return True

    def release(self) -> None:
        self.retrying -= 1
