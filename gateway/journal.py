"""The log: one line per event on stderr, fields as key=value, for people and for grep."""

import json
import logging
import re
import sys

_PLAIN = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}


class Fields(logging.Formatter):
    """``time level event key=value …``; a value with spaces is quoted, None is left out."""

    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        extra = {k: v for k, v in record.__dict__.items() if k not in _PLAIN and v is not None}
        line = f"{self.formatTime(record)} {record.levelname.lower():7} {record.getMessage()}"
        line += "".join(f" {key}={_value(value)}" for key, value in extra.items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


_SIMPLE = re.compile(r"[!#-<>-~]+")  # ASCII, printable, without blank, quote and equals sign


def _value(value: object) -> str:
    text = str(value)
    if _SIMPLE.fullmatch(text):
        return text
    if text and all(c.isprintable() and c not in ' "=' for c in text):
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in json.dumps(text, ensure_ascii=False))


def set_up(level: int = logging.INFO) -> None:
    # As the logging HOWTO has it under "Optimization": no line here tells of threads, processes or source files.
    logging._srcfile = None  # noqa: SLF001 - as documented there
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Fields())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line for each probe of a remote server
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
