"""The explain command: what it prints, and how it ends."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from backends.domain.failure import Cause
from gateway.api.error_mapping import CODE_OF_CAUSE
from gateway.cli.explain import TAIL, explain, main, render

OOM = (
    "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution "
    "failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
)


def run(file: str | None, status: str | None = None, *, as_json: bool = True, stdin: bytes = b"") -> tuple[int, str]:
    out = io.StringIO()
    code = main(file, status, as_json, stdin=io.BytesIO(stdin), stdout=out)
    return code, out.getvalue()


def test_every_cause_has_a_code_or_none() -> None:
    assert set(CODE_OF_CAUSE) == set(Cause) - {Cause.NONE, Cause.CLIENT_GONE}


def test_the_json_form() -> None:
    code, out = run("-", "-6", stdin=OOM.encode() + b"\n")
    found: dict[str, Any] = json.loads(out)
    assert code == 0
    assert set(found) == {"cause", "code", "evidence", "backend_failed", "advice"}
    assert (found["cause"], found["code"], found["backend_failed"]) == ("oom", "backend_oom", True)
    assert found["evidence"] == [OOM]
    assert "memory" in found["advice"]


def test_the_form_for_people() -> None:
    code, out = run(None, "SIGABRT", as_json=False, stdin=OOM.encode())
    assert code == 0
    assert out.startswith("cause:    oom\n")
    assert OOM in out
    assert "(SIGABRT)" in out
    assert out.endswith("\n")


def test_a_healthy_log_is_no_failure() -> None:
    found = explain(["2026-10-03 09:14:07,311 - INFO - Starting httpd at 127.0.0.1 on port 8080..."])
    assert (found["cause"], found["code"], found["evidence"], found["backend_failed"]) == ("none", None, [], False)
    assert "not at fault" in render(found)


def test_a_file(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_bytes(b"Fetching 4 files:   0%|\rFetching 4 files: 100%|\r" + OOM.encode())
    assert json.loads(run(str(log))[1])["cause"] == "oom"


def test_of_a_large_file_the_end_counts(tmp_path: Path) -> None:
    log = tmp_path / "large.log"
    with log.open("wb") as out:
        out.seek(TAIL * 2)
        out.write(b"\n" + OOM.encode() + b"\n")
    assert json.loads(run(str(log))[1])["cause"] == "oom"


def test_bytes_that_are_no_text() -> None:
    code, out = run("-", "139", stdin=bytes(range(256)) * 3)
    assert code == 0
    assert json.loads(out)["cause"] == "native_crash"


@pytest.mark.parametrize("status", ["", "never", "999"])
def test_a_bad_status_is_wrong_usage(status: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-", status) == (2, "")
    assert "exit status" in capsys.readouterr().err


def test_an_unreadable_file_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "nothing.log"))[0] == 2
    assert run(str(tmp_path))[0] == 2
    assert "nothing.log" in capsys.readouterr().err


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    evil = OOM.replace("terminating", "\x1b]0;title\x07\x9b2Jterminating")
    _, text = run("-", "-6", as_json=False, stdin=evil.encode())
    _, as_json = run("-", "-6", stdin=evil.encode())
    assert "\\x1b]0;title\\x07\\x9b2Jterminating" in text
    assert json.loads(as_json)["evidence"] == [evil]
    assert not set("\x1b\x07\x9b") & (set(text) | set(as_json))
