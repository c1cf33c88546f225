"""The form of the log: one line per event, whatever is in it."""

import logging
import re
from collections.abc import Iterator

import pytest

from gateway.cli import logfmt
from gateway.cli.logfmt import LogfmtFormatter


def line(message: str = "backend", *, error: BaseException | None = None, **extra: object) -> str:
    info = (type(error), error, error.__traceback__) if error is not None else None
    record = logging.LogRecord("gateway", logging.WARNING, "", 0, message, (), info)
    record.__dict__.update(extra)
    return LogfmtFormatter().format(record)


def fields(text: str) -> str:
    """What follows the time, the level and the event."""
    found = re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} warning backend(.*)", text, re.DOTALL)
    assert found is not None, text
    return found[1]


def test_an_event_and_its_fields_in_order() -> None:
    assert fields(line()) == ""
    assert fields(line(state="ready", pid=7, ok=True)) == " state=ready pid=7 ok=True"


def test_none_is_left_out_and_other_empty_things_are_not() -> None:
    assert fields(line(cause=None, note="", attempts=0)) == ' note="" attempts=0'


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("qwen3-4b:0", "qwen3-4b:0"),
        ("naïve", "naïve"),
        ("a b", '"a b"'),
        ("a=b", '"a=b"'),
        ('say "hi"', r'"say \"hi\""'),
        ("back\\slash", "back\\slash"),
        ("back\\slash and space", r'"back\\slash and space"'),
        ("one\ntwo\r", r'"one\ntwo\r"'),
        ("/\x1b[2J", r'"/\u001b[2J"'),
        ("\x9b2J\u202e", r'"\x9b2J\x202e"'),
    ],
)
def test_a_value_that_could_be_misread_is_quoted(value: str, shown: str) -> None:
    assert fields(line(reason=value)) == f" reason={shown}"


def test_no_value_makes_a_line_of_its_own() -> None:
    forged = "ok\n2026-01-01 00:00:00.000 error backend state=failed"
    assert "\n" not in line(reason=forged)


def test_a_traceback_follows_its_event() -> None:
    with pytest.raises(ValueError, match="broken") as caught:
        int_of("broken")
    text = line(error=caught.value, request_id="req_1")
    first, *rest = text.splitlines()
    assert first.endswith("backend request_id=req_1")
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "ValueError: broken"


def int_of(text: str) -> int:
    raise ValueError(text)


SWITCHES = ("_srcfile", "logThreads", "logProcesses", "logMultiprocessing")
QUIET = ("httpx", "httpcore", "uvicorn")  # whose every line would be noise


@pytest.fixture
def logging_put_back() -> Iterator[None]:
    root, quiet = logging.getLogger(), [logging.getLogger(name) for name in QUIET]
    handlers, level, levels = root.handlers[:], root.level, [logger.level for logger in quiet]
    switches = {name: getattr(logging, name) for name in SWITCHES}
    root.handlers = []  # set_up closes those it finds
    yield
    root.handlers, root.level = handlers, level
    for name, switch in switches.items():
        setattr(logging, name, switch)
    for logger, old in zip(quiet, levels, strict=True):
        logger.setLevel(old)


def test_set_up_writes_to_stderr(logging_put_back: None, capsys: pytest.CaptureFixture[str]) -> None:
    logfmt.set_up()
    logging.getLogger("x").info("backend", extra={"state": "ready"})
    logging.getLogger("x").debug("not this")
    for name in QUIET:
        logging.getLogger(name).info("nor a line for each probe or start")
    out, err = capsys.readouterr()
    assert out == ""
    (only,) = err.splitlines()
    assert only.endswith("info    backend state=ready")


def test_no_message_or_traceback_does_anything_to_a_terminal() -> None:
    with pytest.raises(ValueError, match="evil") as caught:
        int_of("evil \x1b[2J\x9b")
    text = line("said \x1b]0;x\x07", error=caught.value)
    assert not set("\x1b\x07\x9b") & set(text)
    assert r"said \x1b]0;x\x07" in text
    assert text.splitlines()[-1] == r"ValueError: evil \x1b[2J\x9b"
