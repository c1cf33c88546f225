"""How long an answer is likely to be: learned for each client and model from the answers that it got.

Clients ask for many more tokens than their answers have: an agent sends ``max_tokens: 32000`` and gets a few hundred.
Memory that is kept for all of them would leave most of it unused, so what counts is a length that few answers exceed.
Those that do are noticed as they grow.

Pure.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable

UNKNOWN = 1024  # tokens that an answer is taken to have as long as none was seen
LEAST = 64  # tokens; no answer is taken to be shorter, if it may be longer
QUANTILE = 0.9  # share of the answers that are no longer than what is likely
ANSWERS = 32  # last ones that count, for each client
ENOUGH = 4  # answers to a client; with fewer, those to all clients of the model count
MAX_CLIENTS = 1024


class AnswerLengths:
    """Tokens. ``client``: any key that tells its kind of requests from others."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, deque[int]] = OrderedDict()

    def note(self, model: str, client: Hashable, tokens: int) -> None:
        """An answer was complete."""
        for key in (model, (model, client)):
            seen = self._seen.get(key)
            if seen is None:
                seen = self._seen[key] = deque(maxlen=ANSWERS)
            self._seen.move_to_end(key)
            seen.append(tokens)
        while len(self._seen) > MAX_CLIENTS:
            self._seen.popitem(last=False)

    def likely(self, model: str, client: Hashable, most: int) -> int:
        """``most``: tokens that it may have."""
        for key in ((model, client), model):
            seen = self._seen.get(key)
            if seen is not None and len(seen) >= ENOUGH:
                return min(most, max(LEAST, sorted(seen)[min(len(seen) - 1, int(QUANTILE * len(seen)))]))
        return min(most, UNKNOWN)
