"""The outcome of every request: exactly one each, and none may be WRONG."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from tests.integration.wire import Answer, Json

# Error codes that a client may get while backends fail.
FAILURES = frozenset(
    {
        "backend_crashed",
        "backend_wedged",
        "backend_stalled",
        "backend_oom",  # a SIGKILL while the machine is short of memory is taken for one
        "stream_truncated",
        "model_unavailable",
        "model_loading",
        "overloaded",
    }
)


class Outcome(StrEnum):
    COMPLETE = "complete"
    FAILED = "failed"  # the client got a structured error
    SUSPECTED = "suspected"  # refused: a suspect at two failures
    REFUSED = "refused"  # an invalid request got an error
    LEFT = "left"  # the client disconnected
    WRONG = "wrong"


@dataclass(slots=True)
class Entry:
    what: str
    outcome: Outcome | None = None
    detail: str = ""


@dataclass(slots=True)
class Ledger:
    entries: list[Entry] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, what: str) -> Entry:
        entry = Entry(what)
        with self._lock:
            self.entries.append(entry)
        return entry

    def end(self, entry: Entry, outcome: Outcome, detail: str = "") -> None:
        with self._lock:
            if entry.outcome is not None:
                entry.outcome, entry.detail = Outcome.WRONG, f"{entry.outcome} and then {outcome}"
                return
            entry.outcome, entry.detail = outcome, detail

    @property
    def counts(self) -> Counter[str]:
        return Counter(str(entry.outcome) for entry in self.entries)

    @property
    def wrong(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.outcome in (None, Outcome.WRONG)]


def judge(answer: Answer, *, stream: bool, expected: str | None) -> tuple[Outcome, str]:
    """``expected``: the text, if it is known."""
    if answer.dropped:
        return Outcome.WRONG, f"the connection broke: {answer.dropped}"
    if answer.error is not None:
        return _judge_error(answer, answer.error, expected)
    if answer.status != 200:
        return Outcome.WRONG, f"status {answer.status} without an error"
    if answer.finish is None or (stream and not answer.done):
        return Outcome.WRONG, f"cut: finish_reason {answer.finish}, [DONE] {answer.done}, text {answer.text!r}"
    if not answer.text:
        return Outcome.WRONG, "an empty answer"
    if expected is not None and answer.text != expected:
        return Outcome.WRONG, f"another text: {answer.text!r}, not {expected!r}"
    return Outcome.COMPLETE, ""


def _judge_error(answer: Answer, error: Json, expected: str | None) -> tuple[Outcome, str]:
    about = f"{answer.status} {error}"
    if answer.status == 200 and not answer.done:
        return Outcome.WRONG, f"an error without [DONE]: {about}"
    if not (error["message"] and error["request_id"] and error["type"]):
        return Outcome.WRONG, f"unstructured: {about}"
    if expected is not None and not expected.startswith(answer.text):
        return Outcome.WRONG, f"the text before the error differs: {answer.text!r}"
    if error["code"] == "invalid_request" and "likely cause" in error["message"]:
        return Outcome.SUSPECTED, about
    if error["code"] not in FAILURES or answer.status not in (200, 503):
        return Outcome.WRONG, f"no reason for {about}"
    return Outcome.FAILED, error["code"]
