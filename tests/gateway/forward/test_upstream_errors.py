"""What an upstream says of itself: every code another gateway knows, in an answer and in a stream."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from backends.admission.lease import Lease
from backends.diagnosis.error_answers import judge_answer
from backends.domain.engine import Engine
from backends.domain.failure import Aftermath, Blame, CallFailure, Cause, Reason, Sent
from backends.domain.spec import BackendSpec, Remote
from backends.upstream.exchange import Head
from gateway.api import error_mapping
from gateway.api.error_mapping import CODES
from gateway.api.errors import CATALOGUE, Code
from gateway.forward.upstream_errors import of_answer, of_event
from gateway.policy import failover
from gateway.stream.error_shapes import UpstreamError
from gateway.stream.relay import Seen

SPEC = BackendSpec("far:1", "far", 1, "m", Remote("http://far"), Engine.OTHER)
LEASE = cast("Lease", SimpleNamespace(spec=SPEC, generation=3))
# What each of them is told as here: a key or a name that is wrong upstream is not the client's to mend.
TOLD = {code: Code(code) for code in CODES} | {
    "invalid_api_key": Code.MODEL_UNAVAILABLE,
    "model_not_found": Code.MODEL_UNAVAILABLE,
}


def answered(
    status: int, error: object, *, headers: tuple[tuple[bytes, bytes], ...] = (), mlx: bool = False
) -> CallFailure:
    answer = judge_answer(status, json.dumps({"error": error}).encode(), is_mlx=mlx, codes=CODES)
    assert answer is not None
    return of_answer(LEASE, answer, Head(status, headers))


def by_code(code: str, headers: tuple[tuple[bytes, bytes], ...] = (), **more: Any) -> CallFailure:
    return answered(CATALOGUE[Code(code)].status, {"message": "so it said", "code": code, **more}, headers=headers)


def first(failure: CallFailure) -> failover.TryNext | failover.Resume | failover.Surface:
    """What is decided after a first attempt that sent nothing to the client."""
    generations = int(failure.sent is Sent.MAYBE)
    return failover.decide(failover.Situation(failure, Seen.WAITING, generations=generations, tries=1))


def test_every_code_of_ours_is_known_from_upstream() -> None:
    assert {code.value for code in Code} - set(CODES) == {"forbidden_origin", "conflict"}


def test_the_codes_after_which_nothing_was_begun() -> None:
    assert {code for code, means in CODES.items() if means.sent is Sent.NOTHING} == {
        "overloaded",
        "model_loading",
        "model_unavailable",
        "shutting_down",
        "insufficient_memory",
        "invalid_api_key",
        "model_not_found",
    }


@pytest.mark.parametrize("code", sorted(CODES))
def test_an_answer_keeps_its_code_and_its_words(code: str) -> None:
    failure = by_code(code, param="field")
    assert (failure.upstream.code, failure.upstream.param, failure.verdict.cause, failure.verdict.blame) == (
        code,
        "field",
        CODES[code].cause,
        CODES[code].blame,
    )
    status = CATALOGUE[Code(code)].status
    assert failure.verdict.message == f"far:1 answered with status {status}: so it said"
    assert (failure.verdict.backend, failure.verdict.generation) == ("far:1", 3)
    assert error_mapping.code_of(failure) is TOLD[code]
    assert failure.verdict.aftermath is (Aftermath.WEDGED if code == "backend_wedged" else Aftermath.ALIVE)


@pytest.mark.parametrize("code", sorted(CODES))
def test_an_event_keeps_its_code_and_its_words(code: str) -> None:
    failure = of_event(LEASE, UpstreamError("so it said", code=code))
    assert (failure.upstream.code, failure.verdict.cause, failure.verdict.blame) == (
        code,
        CODES[code].cause,
        CODES[code].blame,
    )
    assert (failure.verdict.message, failure.verdict.backend, failure.verdict.generation) == (
        "far:1: so it said",
        "far:1",
        3,
    )
    assert error_mapping.code_of(failure) is TOLD[code]


@pytest.mark.parametrize("code", sorted(CODES))
def test_whether_another_is_asked_then(code: str) -> None:
    """Whoever was turned away costs no attempt; what is the request's own fault is not tried again."""
    for failure in (by_code(code), of_event(LEASE, UpstreamError("x", code=code))):
        assert failure.sent is (CODES[code].sent)
        own_fault = CODES[code].blame is Blame.REQUEST
        adds_load = failure.sent is Sent.MAYBE and failure.verdict.aftermath is Aftermath.ALIVE
        assert first(failure) == (failover.Surface() if own_fault else failover.TryNext(counts=adds_load))


@pytest.mark.parametrize("code", [None, "server_error", "500", "", "forbidden_origin"])
def test_a_code_that_is_not_ours_is_an_error_of_generation(code: str | None) -> None:
    failure = of_event(LEASE, UpstreamError("sorry", code=code))
    assert (failure.upstream.code, failure.verdict.cause, failure.verdict.blame) == (None, Cause.NONE, Blame.REQUEST)
    assert error_mapping.code_of(failure) is Code.GENERATION_FAILED
    assert first(failure) == failover.TryNext(counts=True, same=True), "it may as well be the server's failure"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The model has crashed without additional information.", "backend_crashed"),
        ("Model unloaded.", "model_unavailable"),
    ],
)
@pytest.mark.parametrize("status", [400, 404, 422, 500])
def test_a_text_that_names_a_dead_model_counts_before_the_status(text: str, code: str, status: int) -> None:
    for failure in (answered(status, text), answered(status, {"message": text}), of_event(LEASE, UpstreamError(text))):
        assert failure.verdict.blame is Blame.BACKEND
        assert error_mapping.code_of(failure) == code
        assert first(failure) == failover.TryNext(counts=failure.sent is Sent.MAYBE)
        assert failure.sent is (Sent.MAYBE if code == "backend_crashed" else Sent.NOTHING)


def test_a_500_without_such_a_text_gets_one_other_try() -> None:
    failure = answered(500, "oops")
    assert error_mapping.code_of(failure) is Code.GENERATION_FAILED
    assert first(failure) == failover.TryNext(counts=True, same=True)
    for seen, generations in ((Seen.OPEN, 2), (Seen.SPEAKING, 1), (Seen.DONE, 1)):
        again = failover.Situation(failure, seen, generations=generations, tries=generations)
        assert failover.decide(again) == failover.Surface()


def test_an_event_with_a_status_for_its_code_is_judged_by_it() -> None:
    failure = of_event(LEASE, UpstreamError("top_k is out of range", code="400"))
    assert error_mapping.code_of(failure) is Code.INVALID_REQUEST
    assert first(failure) == failover.Surface()


# -- when to come back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "field", "expected"),
    [
        (b"30", None, 30.0),
        (b"30", 5, 5.0),  # the body is more exact than a header of whole seconds
        (b"30", 0, 0.0),
        (b"", 7.5, 7.5),
        (b"", None, None),
        (b"Wed, 21 Oct 2026 07:28:00 GMT", None, None),
        (b"-1", None, None),
        (b"\xb2", None, None),
        (b"9" * 400, None, float("inf")),
        (b"30", "soon", 30.0),
        (b"30", -1, 30.0),
    ],
)
def test_retry_after(header: bytes, field: object, expected: float | None) -> None:
    headers = ((b"retry-after", header),) if header else ()
    assert by_code("overloaded", headers, retry_after=field).upstream.retry_after == expected


def test_retry_after_of_any_other_server_reaches_the_client() -> None:
    failure = answered(429, "slow down", headers=((b"retry-after", b"30"),))
    assert (failure.verdict.reason, failure.sent) == (Reason.BUSY, Sent.NOTHING)
    told = error_mapping.of_failure(failure, model="m", suspect=False, eta=3.0, show_output=False, has_content=False)
    assert (told.code, told.status, told.retry_after) == (Code.OVERLOADED, 503, 30.0)
    assert "far:1 answered with status 429: slow down" in told.message


# -- whether to come back ----------------------------------------------------------------------------------------------

NEVER = ((b"x-should-retry", b"false"),)


@pytest.mark.parametrize("code", sorted(CODES))
def test_what_should_not_be_retried_is_not(code: str) -> None:
    failure = by_code(code, NEVER)
    own_fault = CODES[code].blame is Blame.REQUEST
    assert failure.upstream.no_retry is not own_fault, "of a bad request everybody knows"
    assert first(failure) == failover.Surface(suspect=not own_fault)


@pytest.mark.parametrize("said", [(), ((b"x-should-retry", b"true"),), ((b"x-should-retry", b""),)])
def test_otherwise_nobody_is_suspect(said: tuple[tuple[bytes, bytes], ...]) -> None:
    assert not by_code("backend_oom", said).upstream.no_retry


# -- mlx_lm.server itself ----------------------------------------------------------------------------------------------


def test_a_dead_generation_thread_of_mlx_lm() -> None:
    failure = answered(404, "generation thread died", mlx=True)
    assert (failure.verdict.cause, failure.verdict.aftermath, failure.verdict.blame) == (
        Cause.WEDGE,
        Aftermath.WEDGED,
        Blame.BACKEND,
    )
    assert (failure.upstream.code, error_mapping.code_of(failure)) == (None, Code.BACKEND_WEDGED)


def test_a_template_that_raises() -> None:
    failure = answered(404, "Conversation roles must alternate", mlx=True)
    assert (failure.verdict.cause, failure.verdict.blame) == (Cause.BAD_REQUEST, Blame.REQUEST)
    assert error_mapping.code_of(failure) is Code.INVALID_REQUEST
