"""Bodies that were alone in flight when backends failed."""

from backends.failure import Aftermath, Cause, Failure
from gateway.errors import Code
from gateway.quarantine import Quarantine, fingerprint

CRASH = Failure(Cause.NATIVE_CRASH, Aftermath.EXITED, "it crashed")
OOM = Failure(Cause.OOM, Aftermath.EXITED, "it ran out of memory")
BODY = fingerprint("m", {"prompt": "poison"})


def note(quarantine: Quarantine, failure: Failure, *, body: bytes = BODY, now: float = 0.0) -> None:
    quarantine.note(body, failure, prompt_chars=9000, now=now)


def test_one_failure_may_be_chance() -> None:
    quarantine = Quarantine()
    note(quarantine, CRASH)
    assert quarantine.refusal(BODY, model="m", now=1.0) is None


def test_two_failures_are_enough() -> None:
    quarantine = Quarantine()
    note(quarantine, CRASH)
    note(quarantine, CRASH, now=5.0)
    refused = quarantine.refusal(BODY, model="m", now=6.0)
    assert refused is not None
    assert (refused.code, refused.status) == (Code.INVALID_REQUEST, 400)
    assert "native_crash" in refused.message
    assert quarantine.refusal(fingerprint("m", {"prompt": "other"}), model="m", now=6.0) is None


def test_out_of_memory_is_told_as_too_long() -> None:
    quarantine = Quarantine()
    note(quarantine, OOM)
    note(quarantine, OOM)
    refused = quarantine.refusal(BODY, model="m", now=1.0)
    assert refused is not None
    assert refused.code is Code.CONTEXT_LENGTH_EXCEEDED
    assert "9000" in refused.message


def test_it_expires() -> None:
    quarantine = Quarantine(ttl=100.0)
    note(quarantine, CRASH)
    note(quarantine, CRASH, now=50.0)
    assert quarantine.refusal(BODY, model="m", now=149.0) is not None
    assert quarantine.refusal(BODY, model="m", now=150.0) is None
    assert len(quarantine) == 0
    note(quarantine, CRASH, now=160.0)
    assert quarantine.refusal(BODY, model="m", now=161.0) is None, "the count begins anew"


def test_it_is_bounded_and_the_oldest_goes() -> None:
    quarantine = Quarantine(capacity=3)
    bodies = [fingerprint("m", {"prompt": str(i)}) for i in range(5)]
    for body in bodies:
        note(quarantine, CRASH, body=body)
        note(quarantine, CRASH, body=body)
    kept = [quarantine.refusal(body, model="m", now=1.0) is not None for body in bodies]
    assert kept == [False, False, True, True, True]


def test_the_same_words_to_another_model_are_another_matter() -> None:
    assert fingerprint("a", {"prompt": "x"}) != fingerprint("b", {"prompt": "x"})
