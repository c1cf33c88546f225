r"""A child's log, read for causes: what a client can write into it is taken out first, then the signatures are tried.

Regions that are not the server's own words:

    ERROR - JSONDecodeError: … - Raw body: <anything, many lines>      up to the next access line with status 400
    … Request Body: {<JSON, indented by tabs>}                         json.dumps: no forged line can stand at column 0
    DEBUG - <generated text, may go on>                                up to the next record or access line
    <40 dashes> Exception occurred during processing of request …      up to the next 40 dashes: one request's affair
    127.0.0.1 - - [date] "<anything>" 404 -                            only the status is kept

The awkward bit is that a forger may also forge the end of his region. So a line that says "the process is gone" counts
only if the process said nothing afterwards, and what is found here is never proof: an exit status or a probe is. The
other way round, a region that never ended (the process died in it) hides what came after it; then the exit status
gives the cause, in ``verdict``: native_crash or killed, never what stands in the region.

Pure: no I/O, no clock.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from backends.diagnosis.error_answers import judge_answer
from backends.diagnosis.signature import Signature, sig
from backends.diagnosis.signatures import NATIVE, SIGNATURES, match
from backends.diagnosis.signatures_process import FATAL
from backends.domain.failure import Cause

_RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - (DEBUG|INFO|WARNING|ERROR|CRITICAL) - ")
_ACCESS = re.compile(r"\S+ - - \[\d\d/\w{3}/\d{4} \d\d:\d\d:\d\d\] ")
_ANSWERED = re.compile(r"\"(\w*)[^\n]*\" (\d{3}) \S+\s*$")  # the last quote and status: a path may hold others
_COMPLETION = re.compile(r"\"POST (?:/v1)?/(?:chat/)?completions ")  # its 404 is an answer; of other paths, a guess
_DASHES = "-" * 40
_REQUEST_BLOCK = "Exception occurred during processing of request from"
_EXCEPTION = re.compile(r"(?:[A-Za-z_][\w.]*\.)?([A-Z]\w*)(?:: |$)")
_RAISED_BY_CODE = ("RuntimeError", "MemoryError", "OSError", "SystemError")  # the C++ side, the disk; not ValueError
_GONE = ("BrokenPipeError", "ConnectionResetError", "ConnectionAbortedError")
_ORDINARY = re.compile(
    r"Warning: |warnings\.warn\(|\[WARNING\]|resource_tracker: |is deprecated and will be removed|^objc\[\d+\]: Class "
    r"|Prompt Cache: |\bskip(?:ping|ped)?\b|Defaulting to existing file|Returning existing local|Falling back to"
    r"|Python is likely shutting down|(?:^|[\s\[|(-])(?:INFO|DEBUG|TRACE)(?:[\s:|\])-]|$)"
)
_PROGRESS = re.compile(r"Prompt processing progress: [1-9]")
_STOPPED = re.compile(r"^KeyboardInterrupt\b|terminate called without an active exception")

_THREAD_DIED = re.compile(r"generation thread died|Exception in thread [\w-]{1,80} \(_")

STRAGGLERS = 2  # lines that other threads may still print while the process is being aborted

_BY_NAME = {signature.name: signature for signature in SIGNATURES}
_REQUEST = sig("request", Cause.BAD_REQUEST, "socketserver.py")
_STATUS_4XX = sig("status 4xx", Cause.BAD_REQUEST, "access log", faint=True)
_STATUS_503 = sig("status 503", Cause.WEDGE, "mlx_lm/server.py ≥0.32.0: /health only")


@dataclass(frozen=True, slots=True)
class Hit:
    """One matched line. ``request_only``: it concerns one request, the server goes on."""

    at: int
    line: str
    signature: Signature
    request_only: bool = False

    @property
    def cause(self) -> Cause:
        return self.signature.cause


@dataclass(frozen=True, slots=True)
class Reading:
    present: tuple[Hit, ...] = ()
    past: tuple[Hit, ...] = ()  # the server went on working afterwards, or it was an earlier process
    doubtful: tuple[Hit, ...] = ()  # may be a client's or the model's words: count only beside a matching exit status
    stopped: bool = False  # it says that it was asked to stop
    served: bool = False  # it answered a request at some time

    @property
    def thread_died(self) -> bool:
        return any(_THREAD_DIED.search(hit.line) for hit in self.present)

    @property
    def process_died(self) -> bool:
        return any(FATAL.search(hit.line) for hit in self.present)


def read(lines: Sequence[str]) -> Reading:
    reader = LogParser()
    for at, line in enumerate(lines):
        reader.take(at, line)
    return reader.result()


class _State(Enum):
    PLAIN = auto()
    RAW = auto()
    JSON = auto()
    DEBUG = auto()
    BLOCK = auto()


@dataclass(slots=True)
class LogParser:
    state: _State = _State.PLAIN
    hits: list[Hit] = field(default_factory=list)
    doubtful: list[Hit] = field(default_factory=list)
    block: list[tuple[int, str]] = field(default_factory=list)
    served: list[int] = field(default_factory=list)  # a request got its 200, or its prompt went forward
    said: list[int] = field(default_factory=list)  # records and access lines
    started: list[int] = field(default_factory=list)
    fatal: list[int] = field(default_factory=list)
    status: int = 404  # of the last access line
    stopped: bool = False

    def take(self, at: int, line: str) -> None:
        if self.state is _State.RAW:
            access = _ACCESS.match(line)
            if access and (answered := _ANSWERED.match(line, access.end())) and answered[2] == "400":
                self.state = _State.PLAIN
            return
        if self.state is _State.JSON:
            self.state = _State.JSON if line[:1] == "\t" else _State.PLAIN
            if line[:1] in ("\t", "}", "]"):
                return
        if record := _RECORD.search(line):
            self._plain(at, line[: record.start()])
            self._record(at, record[1], line[record.end() :])
        elif access := _ACCESS.search(line):
            self._access(at, line, access.end())
        else:
            self._plain(at, line)

    def _record(self, at: int, level: str, text: str) -> None:
        self.said.append(at)
        if self.state is not _State.BLOCK:
            self.state = _State.PLAIN
        if "Request Body: " in text[:30] or text.startswith("Outgoing Response: "):
            self.state = _State.JSON if text.rstrip()[-1:] in "{[" else _State.PLAIN
        elif level == "DEBUG" and self.state is _State.PLAIN:
            self.state = _State.DEBUG
        if level in ("INFO", "DEBUG"):
            if _PROGRESS.match(text):
                self.served.append(at)
            elif text.startswith("Starting httpd at "):
                self.started.append(at)
        elif level == "WARNING":
            if not _ORDINARY.search(text) and (row := match(text)) and row.cause is Cause.DOWNLOAD:
                self.hits.append(Hit(at, text, _BY_NAME["download retry"]))
        elif text.startswith("JSONDecodeError: ") and " - Raw body: " in text:
            self.hits.append(Hit(at, text[: text.index(" - Raw body: ")], _BY_NAME["not JSON"], request_only=True))
            self.state = _State.RAW
        elif text.startswith("Invalid Request Body: "):
            self.hits.append(Hit(at, "Invalid Request Body", _BY_NAME["not an object"], request_only=True))
        elif row := match(text):
            self.hits.append(Hit(at, text, row))

    def _access(self, at: int, line: str, end: int) -> None:
        self.said.append(at)
        if self.state is _State.DEBUG:
            self.state = _State.PLAIN
        answered = _ANSWERED.match(line, end)
        if answered is None:
            return
        self.status = status = int(answered[2])
        asked = _COMPLETION.match(line, end)
        line = f"{answered[1]} … {status}"
        if status == 200 and answered[1] == "POST":
            self.served.append(at)
        elif status == 503:
            self.hits.append(Hit(at, line, _STATUS_503))
        elif status in (400, 411, 413, 422) or (status == 404 and asked):
            self.hits.append(Hit(at, line, _STATUS_4XX, request_only=True))

    def _plain(self, at: int, line: str) -> None:
        text = line.rstrip()
        if self.state is _State.BLOCK:
            if text != _DASHES:
                self.block.append((at, line))
            elif self.block:
                self._close_block()
        elif text.startswith(_REQUEST_BLOCK):
            self.state = _State.BLOCK
            self.block = [(at, line)]
        elif _STOPPED.search(text):
            self.stopped = True
        elif text.startswith("HTTP body: "):
            self._answer(at, text.removeprefix("HTTP body: "))
        elif text and not _ORDINARY.search(text) and (row := match(text)):
            if self.state is _State.DEBUG:
                self.doubtful.append(Hit(at, text, row))
            else:
                self.hits.append(Hit(at, text, row))
                if FATAL.search(text):
                    self.fatal.append(at)

    def _answer(self, at: int, body: str) -> None:
        verdict = judge_answer(self.status, body.encode(), is_mlx=True)
        if verdict is not None:
            self.hits.append(
                Hit(at, body, sig("answer", verdict.cause, "answer"), request_only=verdict.cause is not Cause.WEDGE)
            )

    def _close_block(self, *, at_end: bool = False) -> None:
        """What a request's own traceback comes to. While it is closed by its dashes, the process outlived it."""
        self.state = _State.PLAIN
        block, self.block = self.block, []
        if at_end and (cut := next((i for i, (_, line) in enumerate(block) if FATAL.search(line)), None)) is not None:
            block, last_words = block[:cut], block[cut:]
            for at, line in last_words:
                self._plain(at, line)
        raised = [(at, line, found[1]) for at, line in block if (found := _EXCEPTION.match(line))]
        for at, line, name in raised:
            if name in _RAISED_BY_CODE and (row := match(line)) and row.cause in NATIVE:
                self.hits.append(Hit(at, line, row, request_only=row.cause is not Cause.WEDGE))
                return
        at, line, name = raised[-1] if raised else (*block[0], "")
        if name in _GONE:
            self.hits.append(Hit(at, line, _BY_NAME["client gone"], request_only=True))
        elif name != "CacheNotFound":  # GET /v1/models without a hub cache: nobody's failure
            self.hits.append(Hit(at, line, _REQUEST, request_only=True))

    def result(self) -> Reading:
        if self.state is _State.BLOCK and self.block:
            self._close_block(at_end=True)
        last_service = max(self.served, default=-1)
        life = max((s for s in self.started if any(f < s for f in self.fatal)), default=-1)
        present: list[Hit] = []
        past: list[Hit] = []
        for hit in self.hits:
            if (spoken := self._spoken_after(hit)) > 0:
                if spoken <= STRAGGLERS:
                    self.doubtful.append(hit)
            elif hit.at < life or (hit.at < last_service and not self._final(hit, last_service)):
                past.append(hit)
            else:
                present.append(hit)
        return Reading(tuple(present), tuple(past), tuple(self.doubtful), self.stopped, bool(self.served))

    def _spoken_after(self, hit: Hit) -> int:
        """A line says that the process is gone, and the process spoke on: then these were somebody else's words."""
        if not FATAL.search(hit.line):
            return 0
        restart = next((s for s in self.started if s > hit.at), None)
        return sum(hit.at < at and (restart is None or at < restart) for at in self.said)

    def _final(self, hit: Hit, last_service: int) -> bool:
        """A dead thread serves no more: a 200 after it was under way in another thread, or is a new process's."""
        return _THREAD_DIED.search(hit.line) is not None and not any(
            hit.at < start < last_service for start in self.started
        )
