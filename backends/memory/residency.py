"""How long a model stays in memory: what a backend keeps of that beside its state. Pure; event loop's times."""

from dataclasses import dataclass

from backends.domain.snapshot import Loading
from backends.domain.state import State

RETRY_ROOM = 30.0  # seconds until room is asked for again, where there was none


@dataclass(slots=True)
class Residency:
    """``asleep``: it is not loaded because nobody needs it, and the next request loads it. ``asked``: somebody wants it
    loaded without a request. ``closed``: it takes no more requests, since it has to give way when it is idle."""

    asleep: bool
    asked: bool = False
    loads: int = 0  # how often it was loaded because it was needed again, which is no restart
    waking: bool = False  # for requests that wait for it
    closed: bool = False
    worn: bool = False  # it has grown too large: others take its requests, until it is idle and begun anew
    size: int = 0  # bytes that it took when it was ready; 0 = not weighed yet
    used: float = 0.0  # when a client's request last began or ended
    since: float = 0.0  # when it became ready
    declined: float | None = None  # when it was told that there is no room for it
    took: float | None = None  # seconds that the last load took
    phase: str = ""  # of a load that has not begun: what it waits for

    def note(self, before: State, after: State, started_at: float, now: float) -> None:
        """The state has changed from ``before``; ``started_at``: when the start began that ended with it."""
        if after is State.READY:
            self.used = self.since = now
            self.size = 0
            if before is State.STARTING:
                self.took = now - started_at
        if after not in (State.STARTING, State.STOPPING):
            self.waking = self.asked = False

    def sleeps(self, state: State, then: State) -> bool:
        """Or is on its way to. ``then``: what follows on STOPPING."""
        leaving = state is State.DRAINING or (state is State.STOPPING and then is State.STOPPED)
        return self.asleep and (leaving or state is State.STOPPED)

    def reluctant(self, now: float) -> bool:
        """There was no room for it only just now."""
        return self.declined is not None and now - self.declined < RETRY_ROOM

    def outgrown(self, memory: int, limit: int | None) -> bool:
        """It takes more than it should: bytes. Not where it did from the start, since then a new one would too."""
        self.size = self.size or memory
        return limit is not None and self.size <= limit < memory

    def loading(self, seconds: float, waiting: str, *, launched: bool) -> Loading:
        """``seconds``: since the start; ``waiting``: what the launch itself waits for."""
        return Loading(self.phase or waiting or ("loading" if launched else "launching"), seconds, self.took)
