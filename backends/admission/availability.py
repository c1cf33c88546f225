"""Which replicas of one model may answer a request: now, after a start or restart, or once the model is loaded.

Decides nothing about slots and turns. No clock: time is an argument.
"""

from collections.abc import Sequence

from backends.admission.backend import Backend
from backends.admission.excluded import NOTHING, Excluded
from backends.domain.state import State


class Availability:
    """Of one model. ``exclude``: what a request has tried already."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.backends = backends

    def candidates(self, exclude: Excluded) -> Sequence[Backend]:
        """An instance that was tried is none; the one after it is."""
        return [b for b in self.backends if _is_candidate(b, exclude)] if exclude else self.backends

    def ready(self, exclude: Excluded = NOTHING) -> bool:
        return any(b.state is State.READY for b in self.candidates(exclude))

    def may_answer(self, exclude: Excluded = NOTHING) -> bool:
        """A replica is up or starting."""
        return any(b.is_up_or_starting for b in self.candidates(exclude))

    def recovers(self, exclude: Excluded, seconds: float) -> bool:
        """A replica is up, or will be within ``seconds`` as far as is known."""
        return any(b.recovers and _is_back_within(b, seconds) for b in self.candidates(exclude))

    def unloaded(self, exclude: Excluded = NOTHING) -> bool:
        """No replica is up or starting, and one would be loaded for a request."""
        usable = self.candidates(exclude)
        return any(b.unloaded for b in usable) and not any(b.is_up_or_starting for b in usable)

    def loading_on_demand(self, exclude: Excluded = NOTHING) -> bool:
        return any(b.loading_on_demand for b in self.candidates(exclude))

    def to_load(self, exclude: Excluded) -> list[Backend]:
        """The unloaded replicas; without those that were refused memory a moment ago, if another replica may answer."""
        others = self.may_answer(exclude)
        unloaded = [b for b in self.candidates(exclude) if b.unloaded]
        return [b for b in unloaded if not (others and b.recently_denied)]


def _is_candidate(backend: Backend, exclude: Excluded) -> bool:
    if backend.state is State.READY:
        return not exclude.excludes(backend.id, backend.generation)
    return backend.id not in exclude.backends


def _is_back_within(backend: Backend, seconds: float) -> bool:
    """As far as is known: how long the first load of a model takes is not. A load on demand goes on only while requests
    are queued for it."""
    if backend.state is State.READY or backend.loading_on_demand:
        return True
    now = backend.snapshot()
    known = now.eta is not None and (now.eta_known or backend.state is not State.STARTING)
    return not known or now.eta is None or now.eta <= seconds
