"""The log: one line per event on stderr, with fields as key=value."""

import json
import logging
import re
import sys
import time
from itertools import islice

from gateway.cli.terminal import printable

_OWN = len(vars(logging.LogRecord("", 0, "", 0, "", (), None)))
_PLAIN = frozenset({"message", "asctime"})  # attributes that other formatters add to a record
_NUMBERS = frozenset({int, float, bool})


class LogfmtFormatter(logging.Formatter):
    """``time level event key=value …``; a value with spaces is quoted, None is omitted."""

    _second = 0  # since the epoch; the second that ``_date_and_time`` shows
    _date_and_time = ""

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._second = second
            self._date_and_time = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        parts = [f"{self._date_and_time}.{int(record.msecs):03d} {record.levelname.lower():7} {record.getMessage()}"]
        for key, value in islice(vars(record).items(), _OWN, None):  # the record's own attributes come first
            if value is not None and key not in _PLAIN:
                parts.append(f"{key}={value if type(value) in _NUMBERS else _value(value)}")
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return printable(line)


_SIMPLE = re.compile(r"[!#-<>-~]+")  # printable ASCII without space, quote and equals sign


def _value(value: object) -> str:
    text = str(value)
    if _SIMPLE.fullmatch(text):
        return text
    if text and all(c.isprintable() and c not in ' "=' for c in text):
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in json.dumps(text, ensure_ascii=False))


def dropped(lines: int) -> str:
    """The line that stands for ``lines`` lines that could not be written."""
    what = {"levelname": "WARNING", "msg": "output dropped", "lines": lines, "reason": "nobody read it in time"}
    return LogfmtFormatter().format(logging.makeLogRecord(what)) + "\n"


def set_up(level: int = logging.INFO) -> None:
    # From the logging HOWTO, "Optimization": log lines here have no thread, process or source file.
    logging._srcfile = None  # noqa: SLF001 - documented in that HOWTO
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogfmtFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line for each probe of a remote server
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
