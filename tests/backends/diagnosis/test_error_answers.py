"""Error answers: mlx_lm.server's 404 for everything, other servers', other gateways'."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.diagnosis.error_answers import AnswerVerdict, judge_answer
from backends.domain.failure import Blame, Cause, CodeMeaning, Reason, Sent

OOM = "[METAL] Command buffer execution failed: x (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"


@pytest.mark.parametrize(
    ("status", "body", "cause", "blame"),
    [
        (404, b'{"error": "generation thread died"}', Cause.WEDGE, Blame.BACKEND),
        (404, b'{"error": "Unknown role: generation thread died"}', Cause.BAD_REQUEST, Blame.REQUEST),
        (404, b'{"error": "Unknown role: Repository Not Found for url: x"}', Cause.BAD_REQUEST, Blame.REQUEST),
        (404, b'{"error": "No safetensors found in /m"}', Cause.LOAD_FAILURE, Blame.OPERATOR),
        (404, b'{"error": "Repo id must be in the form x"}', Cause.MODEL_NOT_FOUND, Blame.OPERATOR),
        (
            404,
            b'{"error": "401 Client Error.\\n\\nRepository Not Found for url: u"}',
            Cause.MODEL_NOT_FOUND,
            Blame.OPERATOR,
        ),
        (
            404,
            b'{"error": "Got: ConnectError\\nAn error happened while trying to locate the files on the Hub"}',
            Cause.DOWNLOAD,
            Blame.OPERATOR,
        ),
        (404, b'{"error": "There is no Stream(gpu, 0) in current thread."}', Cause.WEDGE, Blame.BACKEND),
        (404, f'{{"error": "{OOM}"}}'.encode(), Cause.OOM, Blame.BACKEND),
        (404, b"Not Found", Cause.BAD_REQUEST, Blame.REQUEST),
        (404, b"Conversation roles must alternate", Cause.BAD_REQUEST, Blame.REQUEST),
        (400, b'{"error": "top_k must be at least 0"}', Cause.BAD_REQUEST, Blame.REQUEST),
        (411, b"", Cause.BAD_REQUEST, Blame.REQUEST),
        (503, b'{"status": "unavailable"}', Cause.WEDGE, Blame.BACKEND),
    ],
)
def test_answers_of_mlx_lm(status: int, body: bytes, cause: Cause, blame: Blame) -> None:
    verdict = judge_answer(status, body, is_mlx=True)
    assert verdict is not None
    assert (verdict.cause, verdict.blame) == (cause, blame)
    assert verdict.message


def test_the_field_of_a_range_error_is_named() -> None:
    verdict = judge_answer(400, b'{"error": "top_k must be at least 0"}', is_mlx=True)
    assert verdict is not None
    assert (verdict.param, verdict.message) == ("top_k", "top_k must be at least 0")


def test_another_gateways_error_keeps_its_words() -> None:
    body = {
        "error": {"message": "no room", "type": "server_error", "param": None, "code": "backend_oom", "retry_after": 7}
    }
    codes = {"backend_oom": CodeMeaning(Cause.OOM, Blame.MACHINE, Sent.NOTHING)}
    verdict = judge_answer(503, json.dumps(body).encode(), is_mlx=False, codes=codes)
    assert verdict == AnswerVerdict(
        Cause.OOM, Blame.MACHINE, "no room", sent=Sent.NOTHING, code="backend_oom", retry_after=7
    )
    unread = judge_answer(503, json.dumps(body).encode(), is_mlx=False)
    assert unread == AnswerVerdict(Cause.UNREACHABLE, Blame.BACKEND, "no room"), "by its status alone"


@pytest.mark.parametrize(
    ("status", "body", "cause", "reason"),
    [
        (401, b"", Cause.UNREACHABLE, None),
        (429, b'{"error": {"message": "slow down"}}', Cause.UNREACHABLE, Reason.BUSY),
        (413, b"", Cause.BAD_REQUEST, Reason.TOO_LARGE),
        (404, b'{"detail": "model x not found"}', Cause.MODEL_NOT_FOUND, None),
        (422, b'{"detail": [{"loc": ["body"]}]}', Cause.BAD_REQUEST, None),
        (500, b"CUDA out of memory", Cause.OOM, None),
        (500, b"oops", Cause.NONE, None),
        (502, b"<html>Bad Gateway</html>", Cause.UNREACHABLE, None),
    ],
)
def test_answers_of_other_servers(status: int, body: bytes, cause: Cause, reason: Reason | None) -> None:
    verdict = judge_answer(status, body, is_mlx=False)
    assert verdict is not None
    assert (verdict.cause, verdict.reason, verdict.code) == (cause, reason, None)
    assert verdict.sent is (Sent.NOTHING if reason is Reason.BUSY else Sent.MAYBE)


@given(st.integers(400, 599), st.binary(max_size=60), st.booleans())
def test_any_answer_gets_a_verdict(status: int, body: bytes, is_mlx: bool) -> None:
    assert judge_answer(status, body, is_mlx=is_mlx) is not None
    assert judge_answer(status - 200, body, is_mlx=is_mlx) is None
