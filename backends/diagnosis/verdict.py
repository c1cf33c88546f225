"""What became of a backend: exit status, last lines, probes and answers, weighed into one verdict.

    returncode  text says                       cause
    0 -15 -2    nothing, or asked to stop        none: somebody stopped it
    0 -15 -2    a thread died, a peer was lost   what the text says (a launcher exits 0 when its rank is gone)
    -9          out of memory                    oom
    -9          a final failure                  that: someone cleared away what was broken already
    -9          nothing                          killed; oom when the machine was short of memory
    -6 -11 …    a cause, last words              that cause
    -6          "without an active exception"    none: Python finalising with a live thread, after a SIGINT
    -6 -11 …    nothing                          native_crash
    > 0         a cause                          that cause
    > 0         nothing                          load_failure before it ever served, else native_crash
    unknown     anything                         the best of what is present; a wrapper alone is wedge or native_crash

Text is a hint, status and probes are proof: a client can print any line.

Pure: no I/O, no clock.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backends.diagnosis.error_answers import AnswerVerdict, judge_answer
from backends.diagnosis.log_parser import Hit, Reading, read
from backends.diagnosis.messages import ADVICE, BLAME, MESSAGE
from backends.diagnosis.signatures import rank
from backends.domain.failure import HARMLESS, Aftermath, Blame, Cause
from backends.domain.state import Health
from backends.upstream.exchange import Fault

__all__ = ["AnswerVerdict", "Evidence", "Verdict", "judge", "judge_answer", "parse_exit", "text_cause"]

MAX_EVIDENCE = 5  # lines
MAX_LINE = 500  # characters

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
    """An exit status as people write it, as Python's returncode: ``-6``, ``134``, ``SIGABRT``, ``abrt``, ``signal 6``.

    Shells report a signal as 128 + number; no program here exits by itself with 129 to 159.
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
    """``lines`` as they were printed, oldest first; ``answer`` the status and body of an error answer."""

    lines: Sequence[str] = ()
    returncode: int | None = None
    alive: bool | None = None
    health: Health = Health.UNKNOWN
    signals_sent: frozenset[int] = frozenset()
    stop_requested: bool = False
    starting: bool = False  # it had not yet been proven ready
    memory_short: bool = False  # the machine was short of memory when it died
    memory_limited: bool = False  # the process ran under a limit of its own (ulimit -v, RLIMIT_DATA)
    answer: tuple[int, str] | None = None
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """``evidence``: the matched lines, the best first. ``message``: one sentence without a trailing stop."""

    cause: Cause
    aftermath: Aftermath
    evidence: tuple[str, ...]
    backend_failed: bool
    blame: Blame
    message: str
    advice: str


def judge(evidence: Evidence) -> Verdict:
    """For a process that ended, and for ``explain``. For a live one the text needs a probe beside it."""
    reading = read(evidence.lines)
    cause, hits = _weigh(evidence, reading)
    stopped = _stopped_by_us(evidence) and cause is Cause.NONE
    failed = cause not in HARMLESS or (cause is Cause.NONE and evidence.fault is not None and not stopped)
    shown = _evidence(hits, cause)
    message = MESSAGE[cause] + _how(evidence.returncode)
    if cause is Cause.NONE and evidence.returncode is not None:
        message = f"it was asked to stop, or ended by itself{_how(evidence.returncode)}"
    return Verdict(
        cause=cause,
        aftermath=_aftermath(evidence, reading, cause, hits),
        evidence=shown,
        backend_failed=failed,
        blame=Blame.GATEWAY if stopped else _blame(cause, hits),
        message=message,
        advice=ADVICE[cause],
    )


def text_cause(lines: Sequence[str]) -> tuple[Cause, tuple[str, ...]]:
    """The hint that a live process's output gives, forgeries taken out. It condemns nobody: confirm it by a probe."""
    cause, hits = _of_text(read(lines))
    return cause, _evidence(hits, cause)


_Found = tuple[Cause, tuple[Hit, ...]]


def _weigh(evidence: Evidence, reading: Reading) -> _Found:
    code = evidence.returncode
    if code is None:
        return _of_live(evidence, reading)
    signal = -code if code < 0 else 0
    if _stopped_by_us(evidence) and (signal not in _CRASHES or reading.stopped):
        return Cause.NONE, ()
    if signal in _CRASHES:
        return _of_crash(evidence, reading)
    if code in _STOPS or signal in (_HUP, _KILL, _QUIT):
        ending = [hit for hit in reading.present if not hit.request_only and not hit.signature.faint]
        cause, hits = _best(hit for hit in ending if hit.cause not in HARMLESS)
        if cause in (Cause.NONE, Cause.KILLED, Cause.NATIVE_CRASH) and code not in _STOPS:
            return _of_status(evidence, reading), hits
        return cause, hits
    cause, hits = _best(hit for hit in reading.present if hit.cause not in HARMLESS)
    return (cause, hits) if hits else (_of_status(evidence, reading), ())


def _of_crash(evidence: Evidence, reading: Reading) -> _Found:
    """A failed request, a passed retry or a dead thread says nothing about a crash that came later.

    Doubtful last words are believed beside an abort only: that is how an uncaught C++ exception ends.
    """
    words = (*reading.present, *(reading.doubtful if evidence.returncode == -_ABRT else ()))
    cause, hits = _best(
        hit
        for hit in words
        if not hit.request_only and not hit.signature.faint and hit.cause not in {*HARMLESS, Cause.WEDGE}
    )
    if cause in (Cause.NONE, Cause.NATIVE_CRASH, Cause.KILLED) and _starved(evidence):
        return Cause.OOM, hits
    if hits and cause is not Cause.KILLED:
        return cause, hits
    if evidence.returncode == -_ABRT and reading.stopped:
        return Cause.NONE, ()
    return Cause.NATIVE_CRASH, ()


# The CPU build of mlx (0.30.1 and later) does not look whether malloc gave anything: under a memory limit every failed
# allocation was a SIGSEGV with a stack in generate.py, and never a word about memory (seen at 27 limits, mlx 0.32.4).
# Other ways to a SIGSEGV (a token id beyond the vocabulary) have their frames elsewhere.
_GENERATING = re.compile(r'mlx_lm/generate\.py", line \d+ in ')


def _starved(evidence: Evidence) -> bool:
    if not evidence.memory_limited or evidence.returncode != -_SEGV:
        return False
    return any(map(_GENERATING.search, evidence.lines))


def _of_status(evidence: Evidence, reading: Reading) -> Cause:
    """The cause that the exit status alone gives."""
    code = evidence.returncode or 0
    if code == -_KILL:
        return Cause.OOM if evidence.memory_short else Cause.KILLED
    if code in (-_HUP, -_QUIT):
        return Cause.KILLED
    if code in (2, 126, 127):
        return Cause.DEPENDENCY
    if code > 0 and (evidence.starting or not reading.served):
        return Cause.LOAD_FAILURE if evidence.lines else Cause.NATIVE_CRASH
    return Cause.NATIVE_CRASH


def _of_live(evidence: Evidence, reading: Reading) -> _Found:
    cause, hits = _of_text(reading)
    if evidence.health is Health.UNAVAILABLE:
        dead = [hit for hit in (*reading.present, *reading.past) if hit.cause not in HARMLESS and not hit.request_only]
        cause, hits = _best(dead)
        return (cause, hits) if hits else (Cause.WEDGE, ())
    if evidence.answer is not None and cause in HARMLESS:
        answered = judge_answer(evidence.answer[0], evidence.answer[1].encode(), is_mlx=True)
        if answered is not None:
            return answered.cause, ()
    if cause not in HARMLESS or evidence.fault is None:
        return cause, hits
    return _of_fault(evidence, cause), hits


def _of_fault(evidence: Evidence, cause: Cause) -> Cause:
    match evidence.fault:
        case Fault.REFUSED | Fault.UNREACHABLE | Fault.CONNECT_TIMEOUT | Fault.CONNECT_RESET:
            return Cause.UNREACHABLE
        case Fault.STALLED | Fault.DEADLINE:
            return Cause.START_TIMEOUT if evidence.starting else Cause.STALLED
        case _:
            return cause


def _of_text(reading: Reading) -> _Found:
    """What is present; else a failure of the machine's that has passed (a lost download that came back is none)."""
    failures = [hit for hit in reading.present if hit.cause not in HARMLESS]
    if failures:
        return _best(failures)
    if reading.past:
        cause, hits = _best(hit for hit in reading.past if hit.cause in _WORTH_TELLING)
        if hits:
            return cause, hits
    harmless = [hit for hit in reading.present if not hit.signature.faint]
    return _best(
        harmless or [*reading.present, *(hit for hit in reading.past if not hit.signature.faint and hit.request_only)]
    )


_WORTH_TELLING = frozenset(
    {
        Cause.OOM, Cause.RESOURCE_LIMIT, Cause.GPU_TIMEOUT, Cause.GPU_VICTIM, Cause.GPU_FAULT,
        Cause.DISTRIBUTED, Cause.NATIVE_CRASH, Cause.KILLED,
    }
)  # fmt: skip


def _best(hits: Iterable[Hit]) -> _Found:
    """The best row; among its lines and those of the same cause, the last one first."""
    ordered = sorted(hits, key=lambda hit: (*rank(hit.signature), -hit.at))
    if not ordered:
        return Cause.NONE, ()
    cause = ordered[0].cause
    return cause, tuple(hit for hit in ordered if hit.cause is cause)


def _stopped_by_us(evidence: Evidence) -> bool:
    code = evidence.returncode
    return evidence.stop_requested or (code is not None and -code in evidence.signals_sent)


def _aftermath(evidence: Evidence, reading: Reading, cause: Cause, hits: tuple[Hit, ...]) -> Aftermath:
    if evidence.returncode is not None or evidence.alive is False:
        return Aftermath.EXITED
    if evidence.health in (Health.UNAVAILABLE, Health.SILENT):
        return Aftermath.WEDGED
    if evidence.alive and evidence.health is Health.OK and cause not in (Cause.WEDGE, Cause.STALLED):
        return Aftermath.ALIVE
    if cause in HARMLESS or (hits and hits[0].request_only):
        return Aftermath.ALIVE
    if reading.thread_died or cause in (Cause.WEDGE, Cause.PORT_IN_USE):
        return Aftermath.WEDGED
    if reading.process_died or cause in (Cause.NATIVE_CRASH, Cause.KILLED):
        return Aftermath.EXITED
    if hits and hits[0].signature.faint:
        return Aftermath.ALIVE
    return Aftermath.UNKNOWN


def _blame(cause: Cause, hits: tuple[Hit, ...]) -> Blame:
    return Blame.REQUEST if hits and hits[0].request_only else BLAME[cause]


def _evidence(hits: tuple[Hit, ...], cause: Cause) -> tuple[str, ...]:
    lines = dict.fromkeys(hit.line.strip()[:MAX_LINE] for hit in hits if hit.cause is cause)
    return tuple(lines)[:MAX_EVIDENCE]


def _how(code: int | None) -> str:
    if code is None:
        return ""
    if code >= 0:
        return f" (exit status {code})"
    return f" ({_SIGNAL_NAME.get(-code, f'signal {-code}')})"
