r"""Parser of a child's log, line by line: text that a client can write into the log is removed, then each line is
matched against the signature table.

Regions that are not the server's own text:

    ERROR - JSONDecodeError: … - Raw body: <anything, many lines>      up to the next access line with status 400
    … Request Body: {<JSON, indented by tabs>}                         json.dumps: no forged line can begin at column 0
    DEBUG - <generated text, may go on>                                up to the next record or access line
    <40 dashes> Exception occurred during processing of request …      up to the next 40 dashes: concerns one request
    127.0.0.1 - - [date] "<anything>" 404 -                            only the status is kept

Caveat: a client can also forge the end of a region. So a line that reports the end of the process counts only if the
process logged nothing afterwards, and a finding is never proof: an exit status or a probe is. Conversely, a region
that never ended (the process died in it) hides what follows; then ``verdict`` takes the cause from the exit status:
native_crash or killed, never from text in the region.

One parser per instance. ``feed`` costs time in proportion to the length of the line, of which it reads the start and
the end; ``reading`` costs time in proportion to the hits of the last ``window`` lines, changes nothing, and can be
called after any line.

Pure: no I/O, no clock.
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from backends.diagnosis.error_answers import judge_answer
from backends.diagnosis.findings import Findings, Found, Reading, Run, hit_of, sort_out
from backends.diagnosis.frames import Frames
from backends.diagnosis.signature import Signature, sig
from backends.diagnosis.signatures import NATIVE, SIGNATURES, match
from backends.diagnosis.signatures_process import FATAL
from backends.domain.failure import Cause
from backends.domain.report import PREFIX

READ_CHARS = 1024  # of a line, from its start and from its end: a request's status stands at the end

# No pattern is quadratic in the length of a line: a repeat whose following text it could match itself is possessive.
_RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - (DEBUG|INFO|WARNING|ERROR|CRITICAL) - ")
_DATE = r" - - \[\d\d/\w{3}/\d{4} \d\d:\d\d:\d\d\] "
_ACCESS = re.compile(r"(?<=\S)" + _DATE)
_ACCESS_LINE = re.compile(r"\S++" + _DATE)
_ANSWERED = re.compile(r"\"(\w*+)[^\n]*\" (\d{3}) \S++\s*+$")  # the last quote and status: the path may contain others
_COMPLETION = re.compile(r"\"POST (?:/v1)?/(?:chat/)?completions ")  # 404 is an API answer; elsewhere a guessed path
_DASHES = "-" * 40
_REQUEST_BLOCK = "Exception occurred during processing of request from"
_CLIENT_PORT = re.compile(r" \('[^']{0,64}', (\d{1,5})")  # socketserver prints the address of the client
_EXCEPTION = re.compile(r"(?:[A-Za-z_][\w.]*\.)?([A-Z]\w*)(?:: |$)")
MAX_PORTS = 256  # of either kind, that are kept until they are taken out
_NATIVE_EXCEPTIONS = ("RuntimeError", "MemoryError", "OSError", "SystemError")  # from C++ or the disk; not ValueError
_CLIENT_GONE_ERRORS = ("BrokenPipeError", "ConnectionResetError", "ConnectionAbortedError")
_NO_FAILURE = re.compile(
    r"Warning: |warnings\.warn\(|\[WARNING\]|resource_tracker: |is deprecated and will be removed|^objc\[\d+\]: Class "
    r"|Prompt Cache: |\bskip(?:ping|ped)?\b|Defaulting to existing file|Returning existing local|Falling back to"
    r"|Python is likely shutting down|(?:^|[\s\[|(-])(?:INFO|DEBUG|TRACE)(?:[\s:|\])-]|$)"
)
_PREFILL_BEGUN = re.compile(r"Prompt processing progress: [1-9]")
_INTERRUPTED = re.compile(r"KeyboardInterrupt\b")
_FINALISING = "terminate called without an active exception"
# mlx_lm/server.py, 0.31.3 to 0.32.2: a tool call is dropped at a ValueError; any other exception ends the request.
_DROPPED_CALL = "Failed to parse tool call ("
_RAISED_IN_CALL = re.compile(r"\btool_formatter\(|/mlx_lm/tool_parsers/|/mlx_lm/server\.py\", line \d+, in _format$")
# The CPU build of mlx (0.30.1 and later) does not check the result of malloc: under a memory limit every failed
# allocation was a SIGSEGV with a stack in generate.py, and no message about memory (seen at 27 limits, mlx 0.32.4).
# Other causes of a SIGSEGV (a token id beyond the vocabulary) have their frames elsewhere.
_GENERATING = re.compile(r'mlx_lm/generate\.py", line \d+ in ')

_BY_NAME = {signature.name: signature for signature in SIGNATURES}
_REQUEST = sig("request", Cause.BAD_REQUEST, "socketserver.py")
_STATUS_4XX = sig("status 4xx", Cause.BAD_REQUEST, "access log", faint=True)
_STATUS_503 = sig("status 503", Cause.WEDGE, "mlx_lm/server.py ≥0.32.0: /health only")


def read(lines: Sequence[str]) -> Reading:
    """The reading of a whole log, oldest line first, without a window."""
    parser = LogParser()
    for line in lines:
        parser.feed(line)
    return parser.reading()


class _Region(Enum):
    PLAIN = auto()
    RAW = auto()
    JSON = auto()
    DEBUG = auto()
    BLOCK = auto()


@dataclass(frozen=True, slots=True)
class _Raised:
    """The exceptions in a request's traceback. ``native``: the first error that the GPU, the allocator or the disk
    raised; ``last``: the last exception, named ``name``, else the line that opens the block."""

    last: Found
    name: str = ""
    native: Found | None = None

    def result(self) -> Found | None:
        if self.native is not None:
            return self.native
        if self.name == "CacheNotFound":  # GET /v1/models without a hub cache: no failure
            return None
        row = _BY_NAME["client gone"] if self.name in _CLIENT_GONE_ERRORS else _REQUEST
        return replace(self.last, hit=replace(self.last.hit, signature=row, request_only=True))


@dataclass(slots=True)
class _Block:
    """A request's traceback whose closing dashes have not been read yet.

    If the process died in it, a line that reports this (``FATAL``) and what follows are the process's last output, not
    part of the traceback. Which of the two holds is known only at the end, so both interpretations are kept.
    """

    opened: int
    raised: _Raised
    before_death: _Raised | None = None  # ``raised`` as it was at the first such line
    last_output: Findings = field(default_factory=Findings)
    nested: bool = False  # another block begins within the last output: its lines are ignored
    port: int = 0  # of the request's connection; 0 = not told
    in_call: bool = False  # raised while a tool call was read

    def found(self) -> list[Found]:
        """If the log ended here."""
        result = (self.before_death or self.raised).result()
        return [*self.last_output.hits, *([result] if result is not None else [])]


@dataclass(slots=True)
class LogParser:
    """``window``: number of lines after which hits are dropped and regions end; None = never.

    ``position``: number of lines so far. ``findings``: a counter of changes that may affect the cause in a reading, so
    that a caller can detect news. ``progress``: number of the last line that reports prefill progress.
    ``lost_clients``: ports of clients whose handler has ended with an exception, for the caller to take out.
    ``dropped_calls``: number of tool calls that the server could not read and dropped. ``raised_in_call``: ports of
    requests that were ended by an exception while a tool call was read, for the caller to take out.
    """

    window: int | None = None
    position: int = 0
    findings: int = 0
    progress: int = 0
    lost_clients: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_PORTS))
    dropped_calls: int = 0
    raised_in_call: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_PORTS))
    _region: _Region = _Region.PLAIN
    _raw_began: int = 0
    _block: _Block | None = None
    _main: Findings = field(default_factory=Findings)
    _run: Run = field(default_factory=Run)
    _frames: Frames = field(default_factory=Frames)
    _run_began: int = 0  # number of its first line; 0 = the start of the log
    _record_count: int = 0  # records and access lines
    _served: int = 0  # the last line that shows a request being served: its 200, or progress on its prompt
    _served_by: int = 0  # ``_run_began`` at that line
    _generating: int = 0  # the last stack frame of mlx_lm/generate.py
    _status: int = 404  # of the last access line

    def feed(self, line: str) -> None:
        self.position += 1
        if line.startswith(PREFIX):  # of our own file in its process, never of a failure of the server
            return
        if len(line) > 2 * READ_CHARS:
            line = f"{line[:READ_CHARS]} … {line[-READ_CHARS:]}"
        self._drop_old()
        if "mlx_lm/generate.py" in line and _GENERATING.search(line):
            self._generating = self.position
        if self._region is _Region.RAW:
            access = _ACCESS_LINE.match(line)
            if access and (answered := _ANSWERED.match(line, access.end())) and answered[2] == "400":
                self._region = _Region.PLAIN
            return
        if self._region is _Region.JSON:
            self._region = _Region.JSON if line[:1] == "\t" else _Region.PLAIN
            if line[:1] in ("\t", "}", "]"):
                return
        if " - " in line and (record := _RECORD.search(line)):
            self._record(record, line)
        elif " - - [" in line and (access := _ACCESS.search(line)):
            self._access(line, access.end())
        else:
            self._plain(line)

    @property
    def shows_requests(self) -> bool:
        """The handlers of the server print into this log; a wrapper may send their output elsewhere."""
        return self._served > 0

    def reading(self, since: int = 0) -> Reading:
        """``since``: hits up to this line are left out."""
        if self.window is not None:
            since = max(since, self.position - self.window)
        main, block = self._main, self._block
        sources = (main,) if block is None else (main, block.last_output)
        found = [*main.hits, *(block.found() if block is not None else ())]
        present, past, doubtful = sort_out(
            (one for one in found if one.hit.at > since),
            restarted_at=max(one.restarted_at for one in sources),
            last_service=self._served,
            run_began=self._served_by,
            record_count=self._record_count,
        )
        return Reading(
            tuple(present),
            tuple(past),
            (*(hit for hit in main.doubtful if hit.at > since), *doubtful),
            stopped=max(one.stopped for one in sources) > since,
            served=self._served > 0,
            printed=self.position > 0,
            generating=self._generating > since,
        )

    def _drop_old(self) -> None:
        if self.window is None:
            return
        oldest = self.position - self.window
        self._main.forget(oldest)
        if self._region is _Region.RAW and self._raw_began <= oldest:
            self._region = _Region.PLAIN
        if self._block is not None and self._block.opened <= oldest:
            self._end_block(died=True)

    # -- one line ------------------------------------------------------------------------------------------------------

    def _record(self, record: re.Match[str], line: str) -> None:
        level, text = record[1], line[record.end() :]
        starting = level in ("INFO", "DEBUG") and text.startswith("Starting httpd at ")
        if starting:
            self._begin_run()
        self._record_count += 1
        self._plain(line[: record.start()])
        if self._region is not _Region.BLOCK:
            self._region = _Region.PLAIN
        if "Request Body: " in text[:30] or text.startswith("Outgoing Response: "):
            self._region = _Region.JSON if text.rstrip()[-1:] in "{[" else _Region.PLAIN
        elif level == "DEBUG" and self._region is _Region.PLAIN:
            self._region = _Region.DEBUG
        if level in ("INFO", "DEBUG"):
            if text.startswith("Prompt processing progress: "):
                self.progress = self.position
                if _PREFILL_BEGUN.match(text):
                    self._note_service()
        elif level == "WARNING":
            self.dropped_calls += text.startswith(_DROPPED_CALL)
            if (row := match(text)) and row.cause is Cause.DOWNLOAD and not _NO_FAILURE.search(text):
                self._add(text, _BY_NAME["download retry"])
        else:
            self._error_record(text)
        if self._region is not _Region.BLOCK:
            self._block = None

    def _error_record(self, text: str) -> None:
        if text.startswith("JSONDecodeError: ") and " - Raw body: " in text:
            self._add(text[: text.index(" - Raw body: ")], _BY_NAME["not JSON"], request_only=True)
            self._region, self._raw_began = _Region.RAW, self.position
        elif text.startswith("Invalid Request Body: "):
            self._add("Invalid Request Body", _BY_NAME["not an object"], request_only=True)
        elif row := match(text):
            self._add(text, row)

    def _access(self, line: str, end: int) -> None:
        self._record_count += 1
        if self._region is _Region.DEBUG:
            self._region = _Region.PLAIN
        answered = _ANSWERED.match(line, end)
        if answered is None:
            return
        self._status = status = int(answered[2])
        text = f"{answered[1]} … {status}"
        if status == 200 and answered[1] == "POST":
            self._note_service()
        elif status == 503:
            self._add(text, _STATUS_503)
        elif status in (400, 411, 413, 422) or (status == 404 and _COMPLETION.match(line, end)):
            self._add(text, _STATUS_4XX, request_only=True)

    def _plain(self, line: str) -> None:
        if _REQUEST_BLOCK in line or line.startswith(" ('"):  # handlers that fail together mix their lines
            self.lost_clients.extend(int(port) for port in _CLIENT_PORT.findall(line))
        if self._block is not None and self._region is _Region.BLOCK:
            self._in_block(self._block, line)
        elif self._match_line(line.rstrip(), self._main):
            self._region = _Region.BLOCK
            port = _CLIENT_PORT.match(line, len(_REQUEST_BLOCK))
            self._block = _Block(self.position, _Raised(self._found(line, _REQUEST)), port=int(port[1]) if port else 0)

    def _match_line(self, text: str, into: Findings) -> bool:
        """Whether the line opens a block."""
        self._frames.note(text)
        if text.startswith(_REQUEST_BLOCK):
            return True
        if _INTERRUPTED.match(text) or _FINALISING in text:
            into.stopped = self.position
        elif text.startswith("HTTP body: "):
            self._answer(text.removeprefix("HTTP body: "), into)
        elif (row := self._frames.cause(text, match(text))) and not _NO_FAILURE.search(text):
            found = self._found(text, row)
            self.findings += 1
            if self._region is _Region.DEBUG:
                into.doubtful.append(found.hit)
            else:
                into.add(found, ends_process=found.hit.fatal)
        return False

    def _answer(self, body: str, into: Findings) -> None:
        verdict = judge_answer(self._status, body.encode(), is_mlx=True)
        if verdict is not None:
            signature = sig("answer", verdict.cause, "answer")
            self.findings += 1
            into.add(self._found(body, signature, request_only=verdict.cause is not Cause.WEDGE))

    # -- a request's traceback -----------------------------------------------------------------------------------------

    def _in_block(self, block: _Block, line: str) -> None:
        if line.rstrip() == _DASHES:  # closed: the process has survived it
            self._end_block(died=False)
            return
        block.in_call = block.in_call or _RAISED_IN_CALL.search(line.rstrip()) is not None
        if block.before_death is None and FATAL.search(line):
            block.before_death = block.raised
        if block.before_death is not None and not block.nested:
            block.nested = self._match_line(line.rstrip(), block.last_output)
        if (raised := _EXCEPTION.match(line)) is not None:
            block.raised = self._raised(block.raised, line, raised[1])

    def _raised(self, earlier: _Raised, line: str, name: str) -> _Raised:
        native = earlier.native
        if native is None and name in _NATIVE_EXCEPTIONS and (row := match(line)) and row.cause in NATIVE:
            native = self._found(line, row, request_only=row.cause is not Cause.WEDGE)
            self.findings += 1
        return _Raised(self._found(line, _REQUEST), name, native)

    def _end_block(self, *, died: bool) -> None:
        block, self._block, self._region = self._block, None, _Region.PLAIN
        if block is None:
            return
        self.findings += 1
        if block.in_call and block.port and not died:
            self.raised_in_call.append(block.port)
        if died:
            self._main.take_over(block.last_output)
        result = (block.before_death if died and block.before_death else block.raised).result()
        if result is not None:
            self._main.add(result)

    # -- results -------------------------------------------------------------------------------------------------------

    def _found(self, line: str, signature: Signature, *, request_only: bool = False) -> Found:
        return Found(hit_of(self.position, line, signature, request_only=request_only), self._record_count, self._run)

    def _add(self, line: str, signature: Signature, *, request_only: bool = False) -> None:
        self.findings += 1
        self._main.add(self._found(line, signature, request_only=request_only))

    def _note_service(self) -> None:
        self._served, self._served_by = self.position, self._run_began

    def _begin_run(self) -> None:
        self._run.record_count = self._record_count
        self._run, self._run_began = Run(), self.position
        self._main.run_begins(self.position)
        if self._block is not None:
            self._block.last_output.run_begins(self.position)
