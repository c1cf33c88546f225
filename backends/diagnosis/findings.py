"""What a log has shown so far: hits of the signature table and what was logged after them.

Findings are added line by line, each at a cost that does not depend on the number of earlier lines. ``sort_out``
computes a new value and changes nothing here.

Pure: no I/O, no clock.
"""

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from backends.diagnosis.signature import Signature
from backends.diagnosis.signatures_process import FATAL
from backends.domain.failure import Cause

MAX_LINES_AFTER_ABORT = 2  # that other threads may still print while the process is being aborted
MAX_EVIDENCE_CHARS = 500  # kept of a line

_THREAD_DIED = re.compile(r"generation thread died|Exception in thread [\w-]{1,80} \(_")


@dataclass(frozen=True, slots=True)
class Hit:
    """One matched line. ``at``: its number in the log. ``request_only``: it concerns one request, the server continues.
    ``fatal``: it reports the end of the process. ``thread_died``: it reports the end of the generation thread."""

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
    return Hit(at, line.strip()[:MAX_EVIDENCE_CHARS], signature, request_only, fatal, thread_died)


@dataclass(frozen=True, slots=True)
class Reading:
    """``present``: still applies. ``past``: the server served requests afterwards, or the hit is of an earlier process.
    ``doubtful``: may be the text of a client or of the model, counts only together with a matching exit status."""

    present: tuple[Hit, ...] = ()
    past: tuple[Hit, ...] = ()
    doubtful: tuple[Hit, ...] = ()
    stopped: bool = False  # the output says that the server was asked to stop
    served: bool = False  # the server has served a request
    printed: bool = False  # there is any output
    generating: bool = False  # the output has a stack frame of mlx_lm/generate.py


@dataclass(slots=True)
class Run:
    """One run of a server within the log, up to the line with which the next run begins. ``record_count``: records and
    access lines in the log when the run ended; None = it has not ended."""

    record_count: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A hit and its place: ``record_count`` is the number of records and access lines up to it."""

    hit: Hit
    record_count: int
    run: Run


@dataclass(slots=True)
class Findings:
    """``restarted_at``: number of the line with which a server began after another had died, 0 = none."""

    hits: deque[Found] = field(default_factory=deque)
    doubtful: deque[Hit] = field(default_factory=deque)
    stopped: int = 0  # number of the last line that reports a requested stop
    died: bool = False
    restarted_at: int = 0

    def add(self, found: Found, *, ends_process: bool = False) -> None:
        self.hits.append(found)
        self.died = self.died or ends_process

    def run_begins(self, at: int) -> None:
        if self.died:
            self.restarted_at = at

    def take_over(self, other: "Findings") -> None:
        self.hits.extend(other.hits)
        self.stopped = max(self.stopped, other.stopped)
        self.died = self.died or other.died
        self.restarted_at = max(self.restarted_at, other.restarted_at)

    def forget(self, up_to: int) -> None:
        """Hits are in the order in which they were found; a hit that was found late is dropped after its neighbours."""
        while self.hits and self.hits[0].hit.at <= up_to:
            self.hits.popleft()
        while self.doubtful and self.doubtful[0].at <= up_to:
            self.doubtful.popleft()


def sort_out(
    found: Iterable[Found], *, restarted_at: int, last_service: int, run_began: int, record_count: int
) -> tuple[list[Hit], list[Hit], list[Hit]]:
    """Present, past, doubtful. ``run_began``: number of the line with which the last run before ``last_service``
    began."""
    present: list[Hit] = []
    past: list[Hit] = []
    doubtful: list[Hit] = []
    for one in found:
        hit = one.hit
        if (after := _records_after(one, record_count)) > 0:
            if after <= MAX_LINES_AFTER_ABORT:
                doubtful.append(hit)
        elif hit.at < restarted_at or (hit.at < last_service and not (hit.thread_died and run_began <= hit.at)):
            past.append(hit)
        else:
            present.append(hit)
    return present, past, doubtful


def _records_after(found: Found, record_count: int) -> int:
    """Records that the process logged after a line that reports its end: such a line is not the process's own text."""
    if not found.hit.fatal:
        return 0
    end = record_count if found.run.record_count is None else found.run.record_count
    return end - found.record_count
