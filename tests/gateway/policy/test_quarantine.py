"""Bodies that were suspects when backends failed."""

from itertools import count

from backends.domain.failure import Aftermath, CallFailure, Cause
from gateway.api.errors import Code
from gateway.policy.quarantine import Fingerprint, Quarantine
from tests.failures import call_failure, changed

CRASH = call_failure(Cause.NATIVE_CRASH, Aftermath.EXITED, "it crashed")
OOM = call_failure(Cause.OOM, Aftermath.EXITED, "it ran out of memory", suspect=True, alone=True, inflight=1)
CROWD = call_failure(Cause.OOM, Aftermath.EXITED, "it ran out of memory", suspect=True, inflight=6)
LIVES = count(1)
BODY = Fingerprint("m", {"prompt": "poison"})()


def fingerprint(model: str, params: dict[str, str]) -> bytes:
    return Fingerprint(model, params)()


def note(quarantine: Quarantine, failure: CallFailure, *, body: bytes = BODY, now: float = 0.0) -> None:
    quarantine.note(body, changed(failure, backend="m:0", generation=next(LIVES)), model="m", tokens=9000, now=now)


def test_one_failure_may_be_chance() -> None:
    quarantine = Quarantine()
    note(quarantine, CRASH)
    assert quarantine.refusal(BODY, 1.0, largest=700) is None


def test_two_failures_are_enough() -> None:
    quarantine = Quarantine()
    note(quarantine, CRASH)
    note(quarantine, CRASH, now=5.0)
    refused = quarantine.refusal(BODY, 6.0, largest=700)
    assert refused is not None
    assert (refused.code, refused.status) == (Code.INVALID_REQUEST, 400)
    assert "native_crash" in refused.message
    assert quarantine.refusal(fingerprint("m", {"prompt": "other"}), 6.0, largest=700) is None


def test_out_of_memory_is_told_as_too_long() -> None:
    quarantine = Quarantine()
    note(quarantine, OOM)
    note(quarantine, OOM)
    refused = quarantine.refusal(BODY, 1.0, largest=700)
    assert refused is not None
    assert refused.code is Code.CONTEXT_LENGTH_EXCEEDED
    assert "9000" in refused.message
    assert "700" in refused.message


def test_of_crowds_only_the_first_counts() -> None:
    quarantine = Quarantine()
    for _ in range(3):
        note(quarantine, CROWD)
    assert quarantine.refusal(BODY, 1.0, largest=700) is None
    assert quarantine.suspected_of_shortage(BODY, 1.0), "from now on it runs alone"
    note(quarantine, OOM)
    assert quarantine.refusal(BODY, 2.0, largest=700) is not None
    assert quarantine.clear(BODY)
    assert not quarantine.suspected(BODY, 3.0), "nothing is held against what was answered"
    note(quarantine, CRASH)
    assert (quarantine.suspected(BODY, 4.0), quarantine.suspected_of_shortage(BODY, 4.0)) == (True, False)


def test_it_expires() -> None:
    quarantine = Quarantine(ttl=100.0)
    note(quarantine, CRASH)
    note(quarantine, CRASH, now=50.0)
    assert quarantine.refusal(BODY, 149.0, largest=700) is not None
    assert quarantine.refusal(BODY, 150.0, largest=700) is None
    assert len(quarantine) == 0
    note(quarantine, CRASH, now=160.0)
    assert quarantine.refusal(BODY, 161.0, largest=700) is None, "the count begins anew"


def test_it_is_bounded_and_the_oldest_goes() -> None:
    quarantine = Quarantine(capacity=3)
    bodies = [fingerprint("m", {"prompt": str(i)}) for i in range(5)]
    for body in bodies:
        note(quarantine, CRASH, body=body)
        note(quarantine, CRASH, body=body)
    kept = [quarantine.refusal(body, 1.0, largest=700) is not None for body in bodies]
    assert kept == [False, False, True, True, True]


def test_the_same_words_to_another_model_are_another_matter() -> None:
    assert fingerprint("a", {"prompt": "x"}) != fingerprint("b", {"prompt": "x"})


def test_two_copies_in_flight_at_one_failure_are_one() -> None:
    quarantine = Quarantine()
    for _ in range(3):
        quarantine.note(BODY, changed(CRASH, backend="m:0", generation=7), model="m", tokens=1, now=0.0)
    assert quarantine.refusal(BODY, 1.0, largest=0) is None
    assert quarantine.suspected(BODY, 1.0)


def test_being_answered_clears_it() -> None:
    quarantine = Quarantine()
    note(quarantine, CRASH)
    assert quarantine.clear(BODY)
    assert not quarantine.suspected(BODY, 1.0)
    assert not quarantine.clear(BODY)


def test_what_the_operator_sees() -> None:
    quarantine = Quarantine(ttl=100.0)
    note(quarantine, OOM)
    note(quarantine, CRASH, body=b"other", now=10.0)
    note(quarantine, CRASH, body=b"other", now=20.0)
    latest, first = quarantine.entries(30.0)
    assert (latest["fingerprint"], latest["failures"], latest["refused"], latest["expires_in"]) == (
        b"other".hex(),
        2,
        True,
        90,
    )
    assert (first["fingerprint"], first["cause"], first["refused"], first["tokens"]) == (BODY.hex(), "oom", False, 9000)
    assert [entry["fingerprint"] for entry in quarantine.entries(110.0)] == [b"other".hex()]


def test_a_fingerprint_is_computed_once() -> None:
    params = {"prompt": "poison"}
    one = Fingerprint("m", params)
    assert one() == BODY
    params["prompt"] = "other"
    assert one() == BODY
