"""Failures and refusals as clients read them: the code, the advice, and what is kept to ourselves."""

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from backends.domain.failure import Aftermath, Blame, CallFailure, Cause, Failure, Reason
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Loading, Snapshot
from backends.domain.state import State
from gateway.api import errors
from gateway.api.error_mapping import (
    LOOK_AGAIN,
    MAX_EVIDENCE,
    TABLE,
    UNKNOWN_ETA,
    GaveUp,
    code_of,
    of_failure,
    of_refusal,
    soonest,
)
from gateway.api.errors import CATALOGUE, Code, GatewayError
from tests.failures import call_failure

LINE = "[METAL] Command buffer execution failed: Insufficient Memory; token=hunter2"


def failed(cause: Cause = Cause.NATIVE_CRASH, aftermath: Aftermath = Aftermath.EXITED, **more: Any) -> CallFailure:
    return call_failure(cause, aftermath, "m:0 died: it was aborted", backend="m:0", **more)


def told(
    failure: CallFailure,
    *,
    suspect: bool = False,
    eta: float | None = 4.0,
    show_output: bool = True,
    has_content: bool = False,
) -> GatewayError:
    return of_failure(failure, model="m", suspect=suspect, eta=eta, show_output=show_output, has_content=has_content)


def snapshot(state: State = State.READY, *, index: int = 0, eta: float | None = None, **more: Any) -> Snapshot:
    more = {"eta_known": eta is not None, "given_up": state is State.FAILED, **more}
    return Snapshot(f"m:{index}", "m", state, None, None, 0, 0, 1, 0.0, eta, **more)


WAITS = "waits for memory: 1.0 GiB available, needs 6.0 GiB; PID 4711 (hog) holds 25.0 GiB"


def waiting(phase: str = WAITS, **more: Any) -> Snapshot:
    return snapshot(State.WAITING_FOR_MEMORY, loading=Loading(phase, 3.0, None), note=phase, eta=5.0, **more)


@pytest.mark.parametrize(
    ("why", "words"),
    [
        (Why.LOADING, f"model 'm' is not ready after the 60 s that this request waited: it {WAITS}; it is loaded as"),
        (Why.UNAVAILABLE, f"model 'm' is not loaded: it {WAITS}; it is loaded as soon as that is free"),
    ],
)
def test_who_waited_for_memory_in_vain_is_told_who_holds_it(why: Why, words: str) -> None:
    other = snapshot(State.FAILED, index=1)
    error = of_refusal(Refusal(why, waited=60.0), [waiting(), other], model="m")
    assert (error.code, error.status, error.retry_after) == (Code.INSUFFICIENT_MEMORY, 503, 5.0)
    assert words in error.message


@pytest.mark.parametrize("other", [snapshot(State.STARTING, index=1), waiting("waits for its turn to load", index=1)])
def test_where_another_replica_is_being_loaded_memory_is_not_the_reason(other: Snapshot) -> None:
    error = of_refusal(Refusal(Why.LOADING, waited=60.0), [waiting(), other], model="m")
    assert error.code is Code.MODEL_LOADING
    beside = of_refusal(Refusal(Why.UNAVAILABLE), [waiting(), other], model="m")
    assert f"m:0 {WAITS}" in beside.message


def test_no_room_in_memory_has_a_code_of_its_own() -> None:
    short = Failure(Cause.LOAD_FAILURE, Aftermath.NOT_LAUNCHED, "m:0 needs about 9 GiB", reason=Reason.NO_MEMORY)
    seen = [snapshot(State.STOPPED, last_failure=short, unloaded=True)]
    error = of_refusal(Refusal(Why.UNAVAILABLE), seen, model="m")
    assert (error.code, error.status) == (Code.INSUFFICIENT_MEMORY, 503)
    assert error.message == "model 'm' cannot be loaded: m:0 needs about 9 GiB"
    other = of_refusal(Refusal(Why.UNAVAILABLE), [*seen, snapshot(State.BACKOFF, index=1)], model="m")
    assert other.code is Code.MODEL_UNAVAILABLE


def test_a_prompt_that_is_cached_whole_is_refused_for_good() -> None:
    verdict = {"blame": Blame.REQUEST, "reason": Reason.PROMPT_CACHED}
    error = told(failed(Cause.NONE, Aftermath.ALIVE, **verdict))
    assert (error.code, error.status, error.should_retry) == (Code.GENERATION_FAILED, 500, False)


def test_one_that_was_stopped_so_that_memory_lasts_is_to_be_sent_again() -> None:
    failure = failed(Cause.OOM, Aftermath.ALIVE, blame=Blame.GATEWAY, reason=Reason.NO_ROOM)
    error = told(failure, has_content=True)
    assert (error.code, error.status, error.should_retry) == (Code.BACKEND_OOM, 503, True)
    assert "send the request again" in error.message


def test_a_prompt_that_was_cached_whole_may_be_sent_again() -> None:
    """The new process has an empty cache."""
    error = told(failed(Cause.WEDGE, Aftermath.WEDGED, reason=Reason.EMPTY_PROMPT, suspect=True), suspect=True)
    assert (error.code, error.status, error.should_retry) == (Code.BACKEND_WEDGED, 503, None)
    assert error.message.endswith("Its prompt cache has ended with it: send the request again")


GIVEN_UP = Failure(Cause.LOAD_FAILURE, Aftermath.EXITED, "m:0 did not start: no tokenizer", Blame.OPERATOR)


def test_what_only_a_person_can_mend_is_not_to_be_sent_again() -> None:
    error = of_refusal(Refusal(Why.UNAVAILABLE), [snapshot(State.FAILED, last_failure=GIVEN_UP)], model="m")
    assert (error.code, error.status, error.should_retry) == (Code.MODEL_UNAVAILABLE, 424, False)
    assert "starts again by itself once that has changed" in error.message
    assert b'"retry_after":null' in errors.body(error, "r")
    assert not any(name == b"retry-after" for name, _ in errors.headers(error))


def test_a_model_that_is_missing_may_appear() -> None:
    missing = Failure(Cause.MODEL_NOT_FOUND, Aftermath.EXITED, "the model folder /x does not exist", Blame.OPERATOR)
    for seen in (snapshot(State.FAILED, last_failure=missing), snapshot(State.BACKOFF, last_failure=missing, eta=50.0)):
        error = of_refusal(Refusal(Why.UNAVAILABLE), [seen], model="m")
        assert (error.status, error.should_retry, error.retry_after) == (503, None, LOOK_AGAIN)


def test_one_that_is_tried_again_anyway_needs_no_person() -> None:
    apart = Failure(Cause.DISTRIBUTED, Aftermath.EXITED, "m:0 has lost its peer")
    error = of_refusal(Refusal(Why.UNAVAILABLE), [snapshot(State.FAILED, last_failure=apart, eta=40.0)], model="m")
    assert (error.status, error.should_retry, error.retry_after) == (503, None, 40.0)


def test_one_replica_that_may_come_back_is_enough_for_a_retry() -> None:
    seen = [snapshot(State.FAILED, last_failure=GIVEN_UP), snapshot(State.BACKOFF, index=1, eta=3.0)]
    error = of_refusal(Refusal(Why.UNAVAILABLE), seen, model="m")
    assert (error.status, error.retry_after) == (503, 3.0)


# -- codes -----------------------------------------------------------------------------------------------------------

WHEN_THE_BACKEND_IS_TO_BLAME = """
oom backend_oom
resource_limit backend_oom
gpu_timeout backend_gpu_error
gpu_victim backend_gpu_error
gpu_fault backend_gpu_error
load_failure model_unavailable
model_not_found model_unavailable
download model_unavailable
disk_full model_unavailable
port_in_use model_unavailable
dependency model_unavailable
distributed backend_crashed
wedge backend_wedged
native_crash backend_crashed
killed backend_crashed
stalled backend_stalled
start_timeout model_unavailable
unreachable model_unavailable
client_gone backend_crashed
bad_request invalid_request
none backend_crashed
"""


@pytest.mark.parametrize("cause", Cause)
def test_the_code_of_each_cause(cause: Cause) -> None:
    table = dict(line.split() for line in WHEN_THE_BACKEND_IS_TO_BLAME.strip().splitlines())
    assert code_of(failed(cause)).value == table[cause.value]
    assert code_of(failed(cause, truncated=True)) is Code.STREAM_TRUNCATED
    assert code_of(failed(cause, blame=Blame.GATEWAY)) is Code.MODEL_UNAVAILABLE
    request = Code.INVALID_REQUEST if cause is Cause.BAD_REQUEST else Code.GENERATION_FAILED
    assert code_of(failed(cause, blame=Blame.REQUEST)) is request


def test_the_code_of_another_gateway_is_kept_and_an_unknown_one_is_not() -> None:
    assert code_of(failed(code="overloaded", truncated=True)) is Code.OVERLOADED
    assert code_of(failed(code="something_else")) is Code.BACKEND_CRASHED


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.BUSY, Code.OVERLOADED),
        (Reason.NO_MEMORY, Code.INSUFFICIENT_MEMORY),
        (Reason.TOO_LARGE, Code.REQUEST_TOO_LARGE),
    ],
)
def test_a_reason_says_more_than_the_cause(reason: Reason, code: Code) -> None:
    assert code_of(failed(Cause.UNREACHABLE, reason=reason)) is code
    assert code_of(failed(Cause.BAD_REQUEST, blame=Blame.REQUEST, reason=reason)) is code


def test_each_cause_has_one_code() -> None:
    told_for = [cause for row in TABLE.values() for cause in row.told_for]
    assert len(told_for) == len(set(told_for))
    assert set(told_for) == set(Cause) - {Cause.NONE, Cause.CLIENT_GONE}
    for code, row in TABLE.items():
        assert not row.told_for or row.means.cause in row.told_for, f"{code} is not read as what it is told for"


@pytest.mark.parametrize("code", ["invalid_api_key", "model_not_found"])
def test_our_key_and_our_name_upstream_are_not_the_clients(code: str) -> None:
    wrong = failed(Cause.UNREACHABLE, Aftermath.UNKNOWN, blame=Blame.OPERATOR, code=code)
    assert code_of(wrong) is Code.MODEL_UNAVAILABLE


@pytest.mark.parametrize("suspect", [False, True])
@pytest.mark.parametrize("has_content", [False, True])
def test_every_failure_makes_a_whole_error(suspect: bool, has_content: bool) -> None:
    for cause, aftermath, blame, truncated in product(Cause, Aftermath, Blame, (False, True)):
        failure = failed(cause, aftermath, blame=blame, truncated=truncated, evidence=(LINE,))
        for show_output in (False, True):
            error = told(failure, suspect=suspect, has_content=has_content, show_output=show_output)
            assert error.code in CATALOGUE
            assert (error.model, error.backend) == ("m", "m:0")
            assert error.should_retry is (False if suspect else None)
            assert error.message.startswith("m:0 died: it was aborted")
            assert ("hunter2" in error.message) == show_output
            body = json.loads(errors.body(error, "r"))["error"]
            if error.status == 503:
                assert body["retry_after"] == 4
                assert dict(errors.headers(error))[b"retry-after"] == b"4"
            else:
                assert body["retry_after"] is None


@pytest.mark.parametrize("eta", [None, 0.0, 0.2, 30.0, 1e9])
def test_when_to_come_back_is_always_between_one_and_59_seconds(eta: float | None) -> None:
    header = dict(errors.headers(told(failed(), eta=eta)))[b"retry-after"]
    assert 1 <= int(header) <= 59


def test_what_another_gateway_says_of_when_to_come_back_goes_first() -> None:
    assert told(failed(retry_after=17.0)).retry_after == 17.0
    assert told(failed(retry_after=0.0)).retry_after == 0.0
    assert told(failed()).retry_after == 4.0


# -- the message -----------------------------------------------------------------------------------------------------


def test_evidence_is_cut_and_not_said_twice() -> None:
    long = told(failed(evidence=("x" * 5000, "second")))
    assert "x" * MAX_EVIDENCE + '"' in long.message
    assert "second" not in long.message
    once = of_failure(
        call_failure(Cause.OOM, Aftermath.EXITED, f"m:0 died: {LINE}", evidence=(LINE,)),
        model="m",
        suspect=False,
        eta=None,
        show_output=True,
        has_content=False,
    )
    assert once.message.count("hunter2") == 1
    assert "its output" not in told(failed()).message


@pytest.mark.parametrize(
    ("failure", "suspect", "has_content", "advice"),
    [
        (failed(Cause.OOM, alone=True, inflight=1), True, False, "This request was alone on it: send a shorter prompt"),
        (
            failed(Cause.OOM, suspect=True, inflight=6),
            False,
            False,
            "Requests in flight: 6; this one was among the largest, and may fit alone: send the request again",
        ),
        (
            failed(Cause.OOM, suspect=True, inflight=1, beside=3),
            False,
            True,
            "Requests in flight: 1, 3 on others that share its memory; this one was among the largest, and may fit",
        ),
        (failed(Cause.OOM), True, False, "This request may be the cause: send a shorter prompt"),
        (failed(Cause.DISK_FULL, blame=Blame.OPERATOR), False, False, "Only the operator of the gateway can mend that"),
        (failed(Cause.RESOURCE_LIMIT), True, True, "shorter prompt"),
        (failed(Cause.KILLED), True, False, "do not send it again"),
        (failed(Cause.KILLED), False, True, "The answer is incomplete"),
        (failed(Cause.UNREACHABLE, Aftermath.UNKNOWN), False, False, "Check that the server runs"),
        (failed(Cause.UNREACHABLE, Aftermath.EXITED), False, False, "send the request again"),
        (failed(Cause.KILLED), False, False, "No other replica could take over"),
    ],
)
def test_every_message_says_what_to_do(failure: CallFailure, suspect: bool, has_content: bool, advice: str) -> None:
    assert advice in told(failure, suspect=suspect, has_content=has_content).message


def test_a_shortage_of_memory_is_told_with_the_size_of_the_prompt() -> None:
    about: Any = {"model": "m", "eta": None, "show_output": True, "has_content": False, "prompt": "58469 tokens"}
    alone = of_failure(failed(Cause.OOM, suspect=True, alone=True, inflight=1), suspect=True, **about)
    assert "This request, of 58469 tokens, was alone on it" in alone.message
    crowd = failed(Cause.OOM, suspect=True, inflight=6)
    waited = of_failure(crowd, suspect=False, gave_up=GaveUp.TURN, **about)
    assert "this one, of 58469 tokens, was among the largest, and may fit alone; no replica was idle" in waited.message
    assert (alone.should_retry, waited.should_retry) == (False, None)


@pytest.mark.parametrize(
    ("gave_up", "advice"),
    [
        (GaveUp.NO_REPLICA, "No other replica could take over"),
        (GaveUp.TRIES, "not the first to fail with this request"),
        (GaveUp.TIME, "The time for this request is over"),
        (GaveUp.RETRIES, "Too many requests are being tried again"),
        (GaveUp.TURN, "No replica was idle, which it needed"),
    ],
)
def test_a_message_says_why_there_was_no_other_try(gave_up: GaveUp, advice: str) -> None:
    about = {"model": "m", "suspect": False, "eta": None, "show_output": True, "has_content": False}
    assert advice in of_failure(failed(Cause.KILLED), gave_up=gave_up, **about).message  # type: ignore[arg-type]


def test_an_error_of_the_request_speaks_for_itself_and_names_the_field() -> None:
    error = told(failed(Cause.BAD_REQUEST, Aftermath.ALIVE, blame=Blame.REQUEST, param="messages"))
    assert (error.code, error.status, error.param) == (Code.INVALID_REQUEST, 400, "messages")
    assert error.message == "m:0 died: it was aborted"


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "code", "words"),
    [
        (Refusal(Why.QUEUE_FULL, queued=64), Code.OVERLOADED, "64 requests wait already (max_queue)"),
        (Refusal(Why.QUEUE_TIMEOUT, waited=60.0), Code.OVERLOADED, "the 60 s that this request waited"),
        (Refusal(Why.QUEUE_TIMEOUT, waited=60.0, unbatchable=True), Code.OVERLOADED, "send it without seed"),
        (
            Refusal(Why.LOADING, waited=12.0),
            Code.MODEL_LOADING,
            "is not ready after the 12 s that this request waited",
        ),
        (Refusal(Why.UNAVAILABLE), Code.MODEL_UNAVAILABLE, "no replica of model 'm' can answer: it has none"),
    ],
)
def test_each_refusal(refusal: Refusal, code: Code, words: str) -> None:
    error = of_refusal(refusal, [], model="m")
    assert (error.code, error.status, error.model) == (code, 503, "m")
    assert error.retry_after == (UNKNOWN_ETA if refusal.why is Why.UNAVAILABLE else None)
    assert words in error.message


@pytest.mark.parametrize(
    ("state", "more", "words"),
    [
        (
            State.FAILED,
            {"note": "gave up: why", "last_failure": failed(Cause.DEPENDENCY).verdict},
            "gave up: why after dependency: m:0 died: it was aborted; it starts again by itself once that has changed",
        ),
        (State.FAILED, {"retry_in": 57.2}, "m:0 gave up; it starts again by itself in about 57 s"),
        (State.BACKOFF, {"eta": 7.4}, "m:0 starts again and should be ready in about 7 s"),
        (State.BACKOFF, {"eta": 0.1}, "in about 1 s"),
        (State.BACKOFF, {"eta": 6.0, "eta_known": False, "retry_in": 0.7}, "can answer: m:0 starts again in about 1 s"),
        (
            State.BACKOFF,
            {"eta": 9.0, "retry_in": 2.0},
            "m:0 starts again in about 2 s and should be ready in about 9 s",
        ),
        (State.STOPPING, {"eta": 6.0}, "m:0 starts again and should be ready in about 6 s"),
        (State.STOPPING, {"given_up": True, "note": "gave up: why"}, "m:0 gave up: why; it starts again by itself"),
        (
            State.BACKOFF,
            {"eta": 60.0, "crash_looping": True},
            "m:0 has failed again and again; it starts again and should be ready in about 60 s",
        ),
        (State.BACKOFF, {"last_failure": failed().verdict}, "m:0 starts again after native_crash: m:0 died"),
        (
            State.UNREACHABLE,
            {"last_failure": failed(Cause.UNREACHABLE).verdict},
            "m:0 is unreachable after unreachable: m:0",
        ),
        (State.STOPPED, {}, "m:0 is stopped"),
        (State.DRAINING, {}, "m:0 is draining"),
    ],
)
def test_why_no_replica_can_answer(state: State, more: dict[str, Any], words: str) -> None:
    assert words in of_refusal(Refusal(Why.UNAVAILABLE), [snapshot(state, **more)], model="m").message


@pytest.mark.parametrize("state", [State.FAILED, State.STOPPING])
def test_who_is_given_up_is_not_waited_for(state: State) -> None:
    """Also while its last process is still being ended."""
    seen = snapshot(state, given_up=True, last_failure=failed(Cause.DEPENDENCY).verdict)
    error = of_refusal(Refusal(Why.UNAVAILABLE), [seen], model="m")
    assert (error.status, error.should_retry, error.retry_after) == (424, False, None)
    beside = of_refusal(Refusal(Why.UNAVAILABLE), [seen, snapshot(State.BACKOFF, index=1, eta=4.0)], model="m")
    assert (beside.status, beside.should_retry, beside.retry_after) == (503, None, 4.0)
    again = of_refusal(Refusal(Why.UNAVAILABLE), [replace(seen, eta=40.0)], model="m")
    assert (again.status, again.retry_after) == (503, 40.0), "hosts of a distributed model may be back unseen"
    missing = replace(seen, last_failure=failed(Cause.MODEL_NOT_FOUND).verdict)
    looked_for = of_refusal(Refusal(Why.UNAVAILABLE), [missing], model="m")
    assert (looked_for.status, looked_for.retry_after) == (503, 5.0)


def test_all_replicas_are_named_and_the_soonest_decides() -> None:
    seen = [
        snapshot(State.BACKOFF, index=0, eta=40.0),
        snapshot(State.BACKOFF, index=1, eta=9.0),
        snapshot(State.FAILED, index=2),
    ]
    error = of_refusal(Refusal(Why.UNAVAILABLE), seen, model="m")
    assert all(f"m:{i}" in error.message for i in range(3))
    assert error.retry_after == 9.0
    assert soonest(seen[2:]) is None
    assert soonest([]) is None


def test_a_refusal_counts_the_requests_whose_clients_have_left() -> None:
    snapshot = Snapshot("m:0", "m", State.READY, 1, None, 0, 0, 1, 0.0, 0.0, abandoned=2)
    for why in (Why.QUEUE_FULL, Why.QUEUE_TIMEOUT):
        assert "2 requests whose clients have left" in of_refusal(Refusal(why), [snapshot], model="m").message
