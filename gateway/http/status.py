"""Bodies of ``/health``, ``/v1/models`` and ``/api/status``, computed from snapshots of the replicas.

Pure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from backends.admission.placement import Cost
from backends.admission.placing import Decision
from backends.domain.snapshot import Loading, Snapshot
from backends.domain.state import State

Json = dict[str, Any]


class ModelStatus(StrEnum):
    OK = "ok"  # every replica is ready, or unloaded on purpose with another one ready
    DEGRADED = "degraded"  # some replicas are ready
    LOADING = "loading"  # no replica is ready, and at least one loads or restarts by itself: requests wait for it
    UNLOADED = "unloaded"  # no replica is ready, and the next request loads the model
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class ModelView:
    """Public data of one model. ``created``: seconds since the epoch. ``resume``: whether another instance can resume
    an answer; ``resumes``: counts of such attempts; ``cached``: prompt tokens, and those of them found in a prompt
    cache; ``decisions``: the last ones about where a request is read; ``now``: event loop time."""

    name: str
    aliases: tuple[str, ...]
    created: int
    queued: int
    resume: str
    resumes: Mapping[str, int]
    cached: Mapping[str, int]
    snapshots: tuple[Snapshot, ...]
    decisions: Sequence[Decision] = ()
    now: float = 0.0


def model_status(snapshots: Sequence[Snapshot]) -> ModelStatus:
    """A replica that misses its health checks does not count as ready, nor does one that an operator stopped or drains.
    One that is being evicted counts as ready: its requests wait in the queue until it is loaded again. A restart is a
    pause, unless the replica is crash looping: then nobody can count on it."""
    up = sum((s.state is State.READY and s.responsive) or s.evicting for s in snapshots)
    unloaded = sum(s.unloaded and not s.evicting for s in snapshots)
    missing = sum(s.missing and not s.evicting for s in snapshots)
    if up and up + unloaded - missing == len(snapshots):
        return ModelStatus.OK
    if up:
        return ModelStatus.DEGRADED
    if any(_comes_up(s) for s in snapshots):
        return ModelStatus.LOADING
    return ModelStatus.UNLOADED if unloaded else ModelStatus.UNAVAILABLE


def _comes_up(s: Snapshot) -> bool:
    loads = s.state is not State.READY or s.faltering or s.loading is not None
    return s.recovers and loads and not (s.crash_looping or s.given_up)


def overall(models: Sequence[ModelView]) -> str:
    """Not "unavailable" as long as requests for a model are accepted: a watchdog must not restart the gateway because
    its only model loads or restarts."""
    statuses = [model_status(m.snapshots) for m in models]
    if all(s is ModelStatus.UNAVAILABLE for s in statuses):
        return "unavailable"
    return "ok" if all(s in (ModelStatus.OK, ModelStatus.UNLOADED) for s in statuses) else "degraded"


def health(models: Sequence[ModelView], *, draining: bool = False) -> Json:
    """``draining``: the gateway refuses new requests, so its status is "unavailable" whatever the models' is."""
    return {
        "status": "unavailable" if draining else overall(models),
        "draining": draining,
        "models": {
            m.name: {
                "status": model_status(m.snapshots).value,
                "resume": m.resume,
                "backends": [_brief(s) for s in m.snapshots],
            }
            for m in models
        },
    }


def status(models: Sequence[ModelView], about: Mapping[str, Any]) -> Json:
    """The data of ``mlx-gateway status``. ``about``: version, pid, draining, and other facts of the gateway."""
    return {
        **about,
        "status": overall(models),
        "models": {
            m.name: {
                "status": model_status(m.snapshots).value,
                "aliases": list(m.aliases),
                "queued": m.queued,
                "resume": m.resume,
                "resumes": dict(m.resumes),
                "prompt_cache": dict(m.cached),
                "decisions": [_decision(each, m.now) for each in m.decisions],
                "backends": [{**_brief(s), **_more(s)} for s in m.snapshots],
            }
            for m in models
        },
    }


def models_list(models: Sequence[ModelView]) -> Json:
    return {"object": "list", "data": [model_card(m) for m in models]}


def model_card(m: ModelView) -> Json:
    return {
        "id": m.name,
        "object": "model",
        "created": m.created,
        "owned_by": "mlx-gateway",
        "aliases": list(m.aliases),
        "status": model_status(m.snapshots).value,
    }


def _brief(s: Snapshot) -> Json:
    failure = s.last_failure
    progress = {} if s.loading is None else {"loading": _progress(s.loading)}
    return {
        "id": s.id,
        "state": s.state.value,
        "pid": s.pid,
        "inflight": s.inflight,
        "abandoned": s.abandoned,
        "restarts": s.restarts,
        "crash_looping": s.crash_looping,
        "failed_lives": s.failed_lives,
        **progress,
        "last_failure": None
        if failure is None
        else {
            "cause": failure.cause.value,
            "at": _iso(s.last_failure_at),
            "message": failure.message,
            "exit": failure.exit,
        },
    }


def _progress(loading: Loading) -> Json:
    expected = None if loading.expected is None else round(loading.expected, 1)
    return {"phase": loading.phase, "seconds": round(loading.seconds, 1), "expected_seconds": expected}


def _more(s: Snapshot) -> Json:
    return {
        "url": s.url,
        "since": _iso(s.since),
        "ready_in": s.eta if s.eta_known else None,
        "retry_in": s.retry_in,
        "responsive": s.responsive,
        "engine": s.engine.value,
        "slots": s.slots,
        "max_inflight": None if s.limit is None else asdict(s.limit),
        "silence_limit": None if s.silence_limit is None else round(s.silence_limit, 1),
        "memory": s.memory,
        "report": None if s.report is None else asdict(s.report),
        "share": None if s.share is None else asdict(s.share),
        "generation": s.generation,
        "note": s.note,
        "evidence": list(s.last_failure.evidence) if s.last_failure else [],
    }


def _decision(d: Decision, now: float) -> Json:
    return {
        "ago": round(now - d.at, 1),
        "prompt_tokens": d.tokens,
        "cached": d.cached,
        "choice": d.choice.id,
        "how": "join" if d.joined else "wait",
        "alternatives": {name: _cost(cost) for name, cost in d.choice.costs.items()},
    }


def _cost(cost: Cost) -> Json:
    """Seconds; of a wait of unknown length nothing is known."""
    if not math.isfinite(cost.total):
        return dict.fromkeys(("cost", "wait", "read", "answer", "others"))
    terms = {"wait": cost.wait, "read": cost.read, "answer": cost.answer, "others": cost.others}
    return {"cost": round(cost.total, 3)} | {name: round(seconds, 3) for name, seconds in terms.items()}


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
