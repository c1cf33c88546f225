"""The verdict on one process: exit status, output and probes, weighed into one cause.

    returncode  text says                        cause
    0 -15 -2    nothing, or asked to stop        none: it was stopped
    0 -15 -2    a thread died, a peer was lost   what the text says (a launcher exits 0 when its rank has ended)
    -9          out of memory                    oom
    -9          a final failure                  that failure: a broken process was killed
    -9          nothing                          killed; oom when the machine was short of memory
    -6 -11 …    a cause, last output             that cause
    -6          "without an active exception"    none: Python finalising with a live thread, after a SIGINT
    -6 -11 …    nothing                          native_crash
    > 0         a cause                          that cause
    > 0         nothing                          load_failure if it never served, else native_crash
    unknown     anything                         the best present hit; a wrapper text alone is wedge or native_crash

Text is a hint, exit status and probes are proof: a client can have any line printed.

Pure: no I/O, no clock.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from backends.diagnosis.findings import Hit, Reading
from backends.diagnosis.messages import ADVICE, BLAME, LOADING_ADVICE, MESSAGE
from backends.diagnosis.signature import Told
from backends.diagnosis.signatures import rank
from backends.domain.failure import HARMLESS, Blame, Cause, Reason
from backends.domain.state import Health

MAX_EVIDENCE = 5  # lines

_HUP, _INT, _QUIT, _ABRT, _KILL, _SEGV, _TERM = 1, 2, 3, 6, 9, 11, 15
_SIGNALS = {
    "HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "TRAP": 5, "ABRT": 6, "FPE": 8, "KILL": 9, "BUS": 10, "SEGV": 11,
    "SYS": 12, "PIPE": 13, "ALRM": 14, "TERM": 15,
}  # fmt: skip
# 7 is BUS on Linux and 10 on macOS, 12 and 31 SYS.
_CRASHES = frozenset({4, 5, 6, 7, 8, 10, 11, 12, 31})
_STOPS = frozenset({0, -_INT, -_TERM})
_SIGNAL_NAME = {number: f"SIG{name}" for name, number in _SIGNALS.items()}
_NUMBERED = re.compile(r"signal:?\s+(\d{1,2})")


def parse_exit(text: str) -> int:
    """An exit status in a usual spelling, as Python's returncode: ``-6``, ``134``, ``SIGABRT``, ``abrt``, ``signal 6``.

    Shells report a signal as 128 + number; no program supervised here exits by itself with 129 to 159.
    """
    word = text.strip()
    if named := _NUMBERED.fullmatch(word.lower()):
        word = f"-{named[1]}"
    signal = _SIGNALS.get(word.upper().removeprefix("SIG"))
    if signal is not None:
        return -signal
    try:
        value = int(word)
    except ValueError:
        raise ValueError(
            f"not an exit status: {text!r}; expected a number (-6, 137), or a signal (SIGABRT, signal 6)"
        ) from None
    if not -64 <= value <= 255:
        raise ValueError(f"not an exit status: {text!r}; expected -64 to 255")
    return 128 - value if 128 < value < 160 else value


@dataclass(frozen=True, slots=True)
class Evidence:
    """``reading``: of the output. ``returncode`` None: the process is running, or its exit status is unknown."""

    reading: Reading
    returncode: int | None = None
    health: Health = Health.UNKNOWN
    starting: bool = False  # not yet proven ready
    memory_short: bool = False  # the machine was short of memory when the process died
    memory_limited: bool = False  # the process had its own limit (ulimit -v, RLIMIT_DATA)
    thread_ended: bool = False  # the process itself has told that its generation thread has ended


@dataclass(frozen=True, slots=True)
class Verdict:
    """``evidence``: the matched lines, the best first. ``message``: one sentence without a full stop."""

    cause: Cause
    evidence: tuple[str, ...]
    blame: Blame
    message: str
    advice: str
    reason: Reason | None = None
    goes_on: bool = False  # the process tries again by itself: no failure yet

    @property
    def backend_failed(self) -> bool:
        return self.cause not in HARMLESS and not self.goes_on


def judge(evidence: Evidence) -> Verdict:
    """For a process that has ended, and for ``explain``. For a running process a probe has to confirm the text."""
    cause, hits = _weigh(evidence)
    failing = evidence.returncode is None and cause not in HARMLESS
    goes_on = failing and bool(hits) and all(hit.signature.faint for hit in hits)
    told = hits[0].signature.told if hits and (goes_on or not hits[0].signature.faint) else None
    told = told or Told(
        MESSAGE[cause], LOADING_ADVICE.get(cause, ADVICE[cause]) if evidence.starting else ADVICE[cause]
    )
    message = told.message + _exit_text(evidence.returncode)
    if cause is Cause.NONE and evidence.returncode is not None:
        message = f"it was asked to stop, or exited by itself{_exit_text(evidence.returncode)}"
    blame = Blame.REQUEST if hits and hits[0].request_only else BLAME[cause]
    return Verdict(cause, _lines(hits, cause), blame, message, told.advice, told.reason, goes_on)


def text_cause(reading: Reading) -> Cause:
    """The cause that a running process's output suggests, client text excluded. Only a probe can confirm it."""
    return _of_text(reading)[0]


_Best = tuple[Cause, tuple[Hit, ...]]


def _weigh(evidence: Evidence) -> _Best:
    code, reading = evidence.returncode, evidence.reading
    if code is None:
        return _of_running(evidence)
    signal = -code if code < 0 else 0
    if signal in _CRASHES:
        return _of_crash(evidence)
    if code in _STOPS or signal in (_HUP, _KILL, _QUIT):
        ending = [hit for hit in reading.present if not hit.request_only and not hit.signature.faint]
        cause, hits = _best(hit for hit in ending if hit.cause not in HARMLESS)
        if cause in (Cause.NONE, Cause.KILLED, Cause.NATIVE_CRASH) and code not in _STOPS:
            return _of_status(evidence), hits
        return cause, hits
    cause, hits = _best(hit for hit in reading.present if hit.cause not in HARMLESS)
    return (cause, hits) if hits else (_of_status(evidence), ())


def _of_crash(evidence: Evidence) -> _Best:
    """A failed request, a completed retry or a dead thread does not explain a later crash.

    Doubtful hits count only together with an abort: that is how an uncaught C++ exception ends.
    """
    code, reading = evidence.returncode, evidence.reading
    candidates = (*reading.present, *(reading.doubtful if code == -_ABRT else ()))
    cause, hits = _best(
        hit
        for hit in candidates
        if not hit.request_only and not hit.signature.faint and hit.cause not in {*HARMLESS, Cause.WEDGE}
    )
    # Under a memory limit a failed allocation of the CPU build of mlx is a SIGSEGV with a stack in generate.py.
    allocation_failed = evidence.memory_limited and code == -_SEGV and reading.generating
    if allocation_failed and cause in (Cause.NONE, Cause.NATIVE_CRASH, Cause.KILLED):
        return Cause.OOM, hits
    if hits and cause is not Cause.KILLED:
        return cause, hits
    if code == -_ABRT and reading.stopped:
        return Cause.NONE, ()
    return Cause.NATIVE_CRASH, ()


def _of_status(evidence: Evidence) -> Cause:
    """The cause that the exit status alone gives."""
    code = evidence.returncode or 0
    if code == -_KILL:
        return Cause.OOM if evidence.memory_short else Cause.KILLED
    if code in (-_HUP, -_QUIT):
        return Cause.KILLED
    if code in (2, 126, 127):
        return Cause.DEPENDENCY
    if code > 0 and (evidence.starting or not evidence.reading.served):
        return Cause.LOAD_FAILURE if evidence.reading.printed else Cause.NATIVE_CRASH
    return Cause.NATIVE_CRASH


def _of_running(evidence: Evidence) -> _Best:
    reading = evidence.reading
    if evidence.health is not Health.UNAVAILABLE and not evidence.thread_ended:
        return _of_text(reading)
    dead = [hit for hit in (*reading.present, *reading.past) if hit.cause not in HARMLESS and not hit.request_only]
    cause, hits = _best(dead)
    return (cause, hits) if hits else (Cause.WEDGE, ())


def _of_text(reading: Reading) -> _Best:
    """A present failure; else a past failure of the machine (an interrupted download that resumed is none)."""
    failures = [hit for hit in reading.present if hit.cause not in HARMLESS]
    if failures:
        return _best(failures)
    if reading.past:
        cause, hits = _best(hit for hit in reading.past if hit.cause in _REPORTED_WHEN_PAST)
        if hits:
            return cause, hits
    harmless = [hit for hit in reading.present if not hit.signature.faint]
    return _best(
        harmless or [*reading.present, *(hit for hit in reading.past if not hit.signature.faint and hit.request_only)]
    )


_REPORTED_WHEN_PAST = frozenset(
    {
        Cause.OOM, Cause.RESOURCE_LIMIT, Cause.GPU_TIMEOUT, Cause.GPU_VICTIM, Cause.GPU_FAULT,
        Cause.DISTRIBUTED, Cause.NATIVE_CRASH, Cause.KILLED,
    }
)  # fmt: skip


def _best(hits: Iterable[Hit]) -> _Best:
    """The cause of the best row, and all hits of that cause: by row, then the latest first."""
    ordered = sorted(hits, key=lambda hit: (*rank(hit.signature), -hit.at))
    if not ordered:
        return Cause.NONE, ()
    cause = ordered[0].cause
    return cause, tuple(hit for hit in ordered if hit.cause is cause)


def _lines(hits: tuple[Hit, ...], cause: Cause) -> tuple[str, ...]:
    return tuple(dict.fromkeys(hit.line for hit in hits if hit.cause is cause))[:MAX_EVIDENCE]


def _exit_text(code: int | None) -> str:
    if code is None:
        return ""
    if code >= 0:
        return f" (exit status {code})"
    return f" ({_SIGNAL_NAME.get(-code, f'signal {-code}')})"
