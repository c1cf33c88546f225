"""What /health, /v1/models and /api/status say of every mix of replicas."""

import json
import math
from dataclasses import replace
from itertools import combinations_with_replacement

import pytest

from backends.admission.placement import Choice, Cost
from backends.admission.placing import Decision
from backends.domain.failure import Aftermath, Cause, Failure
from backends.domain.report import EngineReport
from backends.domain.snapshot import Loading, Snapshot
from backends.domain.state import State
from gateway.http import status
from gateway.http.status import ModelStatus, ModelView, model_status, overall

DEATH = Failure(Cause.OOM, Aftermath.EXITED, "m:1 died", evidence=("[METAL] out of memory",), exit=-6)


RECOVER = {State.READY, State.STARTING, State.WAITING_FOR_MEMORY, State.BACKOFF}


def snapshot(state: State, index: int = 0, *, responsive: bool = True, failure: Failure | None = None) -> Snapshot:
    return Snapshot(
        id=f"m:{index}",
        model="m",
        state=state,
        pid=100 + index,
        url=f"http://127.0.0.1:{9000 + index}",
        inflight=3,
        restarts=2,
        generation=4,
        since=1_700_000_000.0,
        eta=1.5,
        eta_known=True,
        recovers=state in RECOVER,
        given_up=state is State.FAILED,
        responsive=responsive,
        memory=2**30,
        last_failure=failure,
        last_failure_at=1_700_000_000.25 if failure else None,
        note="",
    )


def view(name: str, *states: State) -> ModelView:
    return ModelView(
        name, ("default",), 1_700_000_000, 5, "off", {}, {}, tuple(snapshot(s, i) for i, s in enumerate(states))
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_status_of_every_mix(count: int) -> None:
    for states in combinations_with_replacement(State, count):
        ready = states.count(State.READY)
        if ready == count:
            expected = ModelStatus.OK
        elif ready:
            expected = ModelStatus.DEGRADED
        else:
            expected = ModelStatus.LOADING if RECOVER & set(states) else ModelStatus.UNAVAILABLE
        assert model_status([snapshot(s) for s in states]) is expected


def test_a_ready_one_that_misses_its_checks_is_not_up() -> None:
    silent = snapshot(State.READY, responsive=False)
    assert model_status([silent]) is ModelStatus.UNAVAILABLE
    assert model_status([silent, snapshot(State.READY)]) is ModelStatus.DEGRADED


def test_a_process_that_has_just_ended_is_a_pause_from_the_first_moment_on() -> None:
    """Before its state says so, a watchdog would see an outage."""
    ended = replace(snapshot(State.READY, responsive=False), faltering=True)
    assert model_status([ended]) is ModelStatus.LOADING
    assert model_status([ended, snapshot(State.READY)]) is ModelStatus.DEGRADED
    assert model_status([replace(ended, crash_looping=True)]) is ModelStatus.UNAVAILABLE
    assert overall([replace(view("m"), snapshots=(ended,))]) == "degraded"


@pytest.mark.parametrize("state", sorted(RECOVER - {State.READY}))
def test_a_restart_is_a_pause_unless_it_is_one_of_many(state: State) -> None:
    one = snapshot(state)
    assert model_status([one]) is ModelStatus.LOADING
    looping = replace(one, crash_looping=True)
    assert model_status([looping]) is ModelStatus.UNAVAILABLE
    assert model_status([looping, one]) is ModelStatus.LOADING
    assert model_status([looping, snapshot(State.READY)]) is ModelStatus.DEGRADED


def test_another_gateway_that_loads_the_model_is_no_worse_than_our_own() -> None:
    there = replace(snapshot(State.READY, responsive=False), loading=Loading("loads there", 3.0, None))
    assert model_status([there]) is ModelStatus.LOADING
    assert model_status([replace(there, loading=None)]) is ModelStatus.UNAVAILABLE


def test_the_way_to_an_end_decides() -> None:
    again = replace(snapshot(State.STOPPING), recovers=True)
    assert model_status([again]) is ModelStatus.LOADING
    assert model_status([replace(again, given_up=True)]) is ModelStatus.UNAVAILABLE, "tried again now and then at best"
    assert model_status([snapshot(State.STOPPING)]) is ModelStatus.UNAVAILABLE, "an operator has stopped it"
    assert model_status([replace(snapshot(State.DRAINING), recovers=True)]) is ModelStatus.LOADING, "it is recycled"


def test_a_model_without_replicas_cannot_answer() -> None:
    assert model_status([]) is ModelStatus.UNAVAILABLE


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([], "unavailable"),
        ([view("a", State.READY)], "ok"),
        ([view("a", State.READY), view("b", State.READY, State.READY)], "ok"),
        ([view("a", State.READY, State.BACKOFF)], "degraded"),
        ([view("a", State.READY), view("b", State.FAILED)], "degraded"),
        ([view("a", State.READY), view("b", State.STARTING)], "degraded"),
        ([view("a", State.STARTING)], "degraded"),
        ([view("a", State.BACKOFF)], "degraded"),
        ([view("a", State.BACKOFF), view("b", State.FAILED)], "degraded"),
        ([view("a", State.FAILED, State.BACKOFF)], "degraded"),
        ([view("a", State.FAILED), view("b", State.STOPPED)], "unavailable"),
    ],
)
def test_the_gateway_as_a_whole(models: list[ModelView], expected: str) -> None:
    assert overall(models) == expected
    assert status.health(models)["status"] == expected
    assert status.status(models, {})["status"] == expected


def test_a_model_in_use_without_one_of_its_replicas_is_not_whole() -> None:
    missing = replace(snapshot(State.UNLOADED), unloaded=True, missing=True)
    assert model_status([missing, snapshot(State.READY, 1)]) is ModelStatus.DEGRADED
    assert model_status([missing, missing]) is ModelStatus.UNLOADED


def test_a_model_that_the_next_request_loads_is_well() -> None:
    unloaded = replace(snapshot(State.UNLOADED), unloaded=True)
    evicting = replace(snapshot(State.DRAINING), unloaded=True, evicting=True)
    stopped = snapshot(State.STOPPED)
    loading = replace(snapshot(State.STARTING, 1), loading=Loading("loading", 2.04, 7.0))
    views = [replace(view("m"), snapshots=each) for each in ((unloaded,), (unloaded, snapshot(State.READY, 1)))]
    assert status.model_status((evicting,)).value == "ok", "requests wait in line until it is loaded again"
    assert [status.model_status(v.snapshots).value for v in views] == ["unloaded", "ok"]
    assert [status.overall([v]) for v in views] == ["ok", "ok"]
    assert status.overall([replace(views[0], snapshots=(stopped,))]) == "unavailable"
    told = status.health([replace(views[0], snapshots=(unloaded, loading))])["models"]["m"]
    assert told["status"] == "loading"
    assert told["backends"][1]["loading"] == {"phase": "loading", "seconds": 2.0, "expected_seconds": 7.0}


def test_health_has_the_public_shape() -> None:
    model = ModelView(
        "m", (), 0, 0, "verified", {}, {}, (snapshot(State.READY), snapshot(State.BACKOFF, 1, failure=DEATH))
    )
    said = json.loads(json.dumps(status.health([model])))
    assert list(said) == ["status", "draining", "models"]
    assert (said["models"]["m"]["status"], said["models"]["m"]["resume"]) == ("degraded", "verified")
    well, dead = said["models"]["m"]["backends"]
    keys = {"id", "state", "pid", "inflight", "abandoned", "restarts", "crash_looping", "failed_lives", "last_failure"}
    assert set(well) == set(dead) == keys
    assert well["last_failure"] is None
    assert (dead["id"], dead["state"], dead["pid"], dead["inflight"], dead["restarts"]) == ("m:1", "backoff", 101, 3, 2)
    assert dead["last_failure"] == {
        "cause": "oom",
        "at": "2023-11-14T22:13:20.250+00:00",
        "message": "m:1 died",
        "exit": -6,
    }


def test_status_says_all_that_health_says_and_more() -> None:
    states = (snapshot(State.READY), snapshot(State.FAILED, 1, failure=DEATH))
    model = ModelView("m", ("default",), 0, 5, "off", {"tried": 3}, {"prompt_tokens": 9}, states)
    said = json.loads(json.dumps(status.status([model], {"version": "1", "pid": 9})))
    assert (said["version"], said["pid"]) == ("1", 9)
    assert (said["models"]["m"]["aliases"], said["models"]["m"]["queued"]) == (["default"], 5)
    assert (said["models"]["m"]["resume"], said["models"]["m"]["resumes"]) == ("off", {"tried": 3})
    brief = status.health([model])["models"]["m"]["backends"]
    for full, short in zip(said["models"]["m"]["backends"], brief, strict=True):
        assert short.items() <= full.items()
        assert full["url"].startswith("http://127.0.0.1:900")
        assert full["since"] == "2023-11-14T22:13:20.000+00:00"
        assert (full["ready_in"], full["retry_in"], full["memory"], full["generation"]) == (1.5, None, 2**30, 4)
    guessed = replace(model, snapshots=(replace(states[1], eta_known=False),))
    assert status.status([guessed], {})["models"]["m"]["backends"][0]["ready_in"] is None
    assert [b["evidence"] for b in said["models"]["m"]["backends"]] == [[], ["[METAL] out of memory"]]


def test_what_a_process_tells_of_itself_is_shown() -> None:
    report = EngineReport(active=3, pooled=2, peak=5, generating=True, fixes={"a": "on"})
    model = replace(view("m"), snapshots=(replace(snapshot(State.READY), report=report), snapshot(State.READY, 1)))
    said = json.loads(json.dumps(status.status([model], {})))["models"]["m"]["backends"]
    assert said[0]["report"] == {
        "active": 3,
        "pooled": 2,
        "peak": 5,
        "working_set": None,
        "generating": True,
        "reading": None,
        "decoding": None,
        "longest": None,
        "cached_sequences": None,
        "cached_bytes": None,
        "fixes": {"a": "on"},
    }
    assert said[1]["report"] is None


def test_one_that_fails_again_and_again_is_told() -> None:
    looping = replace(snapshot(State.BACKOFF, failure=DEATH), crash_looping=True, failed_lives=7)
    (told,) = status.health([replace(view("m"), snapshots=(looping,))])["models"]["m"]["backends"]
    assert (told["state"], told["crash_looping"], told["failed_lives"]) == ("backoff", True, 7)
    assert told["last_failure"]["cause"] == "oom"
    (told,) = status.health([view("m", State.READY)])["models"]["m"]["backends"]
    assert not told["crash_looping"]


def test_the_list_of_models() -> None:
    said = status.models_list([view("a", State.READY), view("b", State.STARTING)])
    assert said["object"] == "list"
    assert said["data"][1] == {
        "id": "b",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "mlx-gateway",
        "aliases": ["default"],
        "status": "loading",
    }


def test_who_drains_answers_nobody() -> None:
    told = status.health([view("m", State.READY)], draining=True)
    assert (told["status"], told["draining"], told["models"]["m"]["status"]) == ("unavailable", True, "ok")


def test_the_last_decisions_with_the_cost_of_each_alternative() -> None:
    costs = {"m:0": Cost(2.0, 0.1004, 0.5, 0.0), "m:1": Cost(math.inf, 0.0, 0.0, 0.0)}
    decision = Decision(at=95.0, tokens=8000, cached=7900, joined=False, choice=Choice("m:0", costs))
    model = replace(view("m", State.READY), decisions=(decision,), now=100.0)
    shown = status.status([model], {})["models"]["m"]["decisions"]
    assert json.loads(json.dumps(shown, allow_nan=False)) == [
        {
            "ago": 5.0,
            "prompt_tokens": 8000,
            "cached": 7900,
            "choice": "m:0",
            "how": "wait",
            "alternatives": {
                "m:0": {"cost": 2.6, "wait": 2.0, "read": 0.1, "answer": 0.5, "others": 0.0},
                "m:1": {"cost": None, "wait": None, "read": None, "answer": None, "others": None},
            },
        }
    ]
