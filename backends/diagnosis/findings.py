"""What a log has named so far: hits of the signature table with what came after them, and the reading of both.

Findings are added as lines come, each at a cost that does not depend on the number of lines before. A reading computes
a new value and changes nothing here.

Pure: no I/O, no clock.
"""

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from backends.diagnosis.signature import Signature
from backends.diagnosis.signatures_process import FATAL
from backends.domain.failure import Cause

STRAGGLERS = 2  # lines that other threads may still print while the process is being aborted
MAX_TEXT = 500  # characters of a line that are kept as evidence

_THREAD_DIED = re.compile(r"generation thread died|Exception in thread [\w-]{1,80} \(_")


@dataclass(frozen=True, slots=True)
class Hit:
    """One matched line. ``at``: its number in the log. ``request_only``: it concerns one request, the server goes on.
    ``fatal``: it says that the process is gone. ``thread_died``: it says that the generation thread is."""

    at: int
    line: str
    signature: Signature
    request_only: bool = False
    fatal: bool = False
    thread_died: bool = False

    @property
    def cause(self) -> Cause:
        return self.signature.cause


def hit_of(at: int, line: str, signature: Signature, *, request_only: bool = False) -> Hit:
    fatal, thread_died = FATAL.search(line) is not None, _THREAD_DIED.search(line) is not None
    return Hit(at, line.strip()[:MAX_TEXT], signature, request_only, fatal, thread_died)


@dataclass(frozen=True, slots=True)
class Reading:
    """``present``: holds now. ``past``: the server went on working afterwards, or it was an earlier process.
    ``doubtful``: may be a client's or the model's words, counts only beside a matching exit status."""

    present: tuple[Hit, ...] = ()
    past: tuple[Hit, ...] = ()
    doubtful: tuple[Hit, ...] = ()
    stopped: bool = False  # it says that it was asked to stop
    served: bool = False  # it answered a request at some time
    printed: bool = False  # there was any output
    generating: bool = False  # it printed a stack frame of mlx_lm/generate.py


@dataclass(slots=True)
class Run:
    """One run of a server within the log: up to the line with which the next one begins. ``spoken``: how many records
    and access lines there had been when it ended; None = it goes on."""

    spoken: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A hit, and where it stands: ``spoken`` counts the records and access lines up to it."""

    hit: Hit
    spoken: int
    run: Run


@dataclass(slots=True)
class Findings:
    """``life``: number of the line with which a server began after one had died, 0 = none."""

    hits: deque[Found] = field(default_factory=deque)
    doubtful: deque[Hit] = field(default_factory=deque)
    stopped: int = 0  # number of the last line that says so
    died: bool = False
    life: int = 0

    def add(self, found: Found, *, ends_process: bool = False) -> None:
        self.hits.append(found)
        self.died = self.died or ends_process

    def run_begins(self, at: int) -> None:
        if self.died:
            self.life = at

    def take_over(self, other: "Findings") -> None:
        self.hits.extend(other.hits)
        self.stopped = max(self.stopped, other.stopped)
        self.died = self.died or other.died
        self.life = max(self.life, other.life)

    def forget(self, up_to: int) -> None:
        """Hits are kept in the order in which they were found; one that was found late goes after its neighbours."""
        while self.hits and self.hits[0].hit.at <= up_to:
            self.hits.popleft()
        while self.doubtful and self.doubtful[0].at <= up_to:
            self.doubtful.popleft()


def sort_out(
    found: Iterable[Found], *, life: int, last_service: int, run_began: int, spoken: int
) -> tuple[list[Hit], list[Hit], list[Hit]]:
    """Present, past, doubtful. ``run_began``: number of the line with which the last server began before
    ``last_service``."""
    present: list[Hit] = []
    past: list[Hit] = []
    doubtful: list[Hit] = []
    for one in found:
        hit = one.hit
        if (after := _spoken_after(one, spoken)) > 0:
            if after <= STRAGGLERS:
                doubtful.append(hit)
        elif hit.at < life or (hit.at < last_service and not (hit.thread_died and run_began <= hit.at)):
            past.append(hit)
        else:
            present.append(hit)
    return present, past, doubtful


def _spoken_after(found: Found, spoken: int) -> int:
    """A line says that the process is gone, and the process spoke on: then the words were somebody else's."""
    if not found.hit.fatal:
        return 0
    return (spoken if found.run.spoken is None else found.run.spoken) - found.spoken
