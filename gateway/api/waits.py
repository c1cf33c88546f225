"""What a queued request waits for, in a few words: for the comments of a stream, and for ``x-gateway-queue``. Pure."""

from collections.abc import Sequence

from backends.domain.place import Place
from backends.domain.snapshot import Snapshot
from backends.domain.state import State

_RESTARTING = frozenset({State.BACKOFF, State.STOPPING})
_LOADING = frozenset({State.STARTING, State.WAITING_FOR_MEMORY, State.DRAINING, State.UNLOADED})
NOWHERE = Place()  # of a request that is not queued


def phase(snapshots: Sequence[Snapshot], place: Place = NOWHERE) -> str:
    """Of the replica that will probably be back first: "restarting", "loading" or "waiting for memory"; where one is
    ready, what the request waits for there, and behind how many."""
    first = _first(snapshots)
    if first is None or first.state is State.READY:
        what = place.waits_for.value + (f" ({place.numbers})" if place.numbers else "")
        return what + (f", {place.before} before it" if place.before else "")
    if first.state is State.WAITING_FOR_MEMORY:
        return "waiting for memory"
    again = first.state in _RESTARTING or (first.last_failure is not None and first.state in _LOADING)
    return "restarting" if again else "loading"


def told(snapshots: Sequence[Snapshot], place: Place = NOWHERE, *, model: str, waited: float, crowd: int = 0) -> str:
    """One line. ``waited``: seconds. ``crowd``: requests in flight as memory ran out, if the request is to run alone
    because of that."""
    first, what = _first(snapshots), phase(snapshots, place)
    after = ""
    if first is not None and what == "restarting" and first.last_failure is not None:
        after = f" after {first.last_failure.cause.value}"
    line = f"model {model} {what}{after}, {waited:.0f} s so far"
    if first is not None and first.loading is not None and first.state is State.WAITING_FOR_MEMORY:
        line += f" ({first.loading.phase})"
    if first is not None and first.state is not State.READY and first.eta is not None and first.eta_known:
        line += f", about {max(1, round(first.eta))} s to go"
    elif (first is None or first.state is State.READY) and place.eta is not None:
        line += f", about {max(1, round(place.eta))} s to go"
    if crowd:
        line += f"; memory ran out with {crowd} requests in flight, this one is tried again alone"
    return " ".join(line.split())  # no line break can get in


def _first(snapshots: Sequence[Snapshot]) -> Snapshot | None:
    """The replica that can answer first, as far as is known."""
    coming = [s for s in snapshots if s.recovers] or list(snapshots)
    return min(coming, key=lambda s: (s.eta is None, s.eta or 0.0), default=None)
