"""Liveness of a replica that was ready: (signs) -> well, ask for a token, or condemn.

    /health says 503                          condemn   (mlx-lm 0.32.0 and later: the generation thread is dead)
    the connection is refused, repeatedly     condemn
    requests in flight, silence               condemn after ``timeouts.progress``; sooner when the output names a cause
    nothing in flight, /health is silent      condemn after a while: a stopped process, a machine that thrashes
    output names a cause, or a client left
    after a long silence, nothing in flight   ask for one token: the canary
    the canary got no answer                  condemn

Text alone never condemns: a client can have any line printed in the log (an invalid body is logged raw). It takes
silence, ``/health`` or the canary beside it. A busy backend is never probed with work. For a supervised replica
"condemn" means that its process is replaced, for a remote one that it is taken out until a token comes.

Pure: no I/O, no clock.
"""

from dataclasses import dataclass

from backends.domain.failure import Cause
from backends.domain.state import Health

HINTED_SILENCE = 20.0  # seconds; enough where the output says that the generation thread died
HINTED_DEAFNESS = 5.0  # seconds without an answer to /health; enough beside such output when no request makes progress
IDLE_SILENCE = 30.0  # seconds without an answer to /health, nothing in flight
GONE_AFTER = 3  # refused connects in a row
BUSY_503 = 5  # 503s in a row from a server that is not mlx_lm.server, where one may just mean "busy"


@dataclass(frozen=True, slots=True)
class Signs:
    """Durations in seconds.

    ``waiting``: how many of the requests in flight wait for the backend (the clients of the others do not read).
    ``non_streaming``: none of these could have received anything yet, their answers come in one piece. ``quiet``: for
    how long no request received anything while one waited. ``unanswered``: since ``/health`` was last answered.
    ``hint``: a cause that the output names since the replica was last shown to generate.
    """

    inflight: int
    waiting: int
    non_streaming: bool
    quiet: float
    health: Health
    same_health: int  # how many probes in a row said so
    unanswered: float
    hint: Cause | None
    suspected: bool  # a client left after a long silence
    canary_failed: bool


@dataclass(frozen=True, slots=True)
class Well:
    pass


@dataclass(frozen=True, slots=True)
class AskCanary:
    pass


@dataclass(frozen=True, slots=True)
class Condemn:
    cause: Cause
    reason: str  # a clause: "it ..."


Finding = Well | AskCanary | Condemn


def assess(signs: Signs, *, progress: float, is_mlx: bool) -> Finding:
    """``progress``: ``timeouts.progress`` in seconds."""
    condemned = _by_health(signs, progress, is_mlx=is_mlx) or _by_silence(signs, progress)
    if condemned is not None:
        return condemned
    if signs.canary_failed:
        return Condemn(signs.hint or Cause.WEDGE, "it answers HTTP but generates nothing")
    if signs.inflight == 0 and (signs.hint is not None or signs.suspected):
        return AskCanary()
    return Well()


def _by_health(signs: Signs, progress: float, *, is_mlx: bool) -> Condemn | None:
    if signs.health is Health.UNAVAILABLE and (is_mlx or signs.same_health >= BUSY_503):
        why = ": its generation thread is dead" if is_mlx else ""
        return Condemn(signs.hint or Cause.WEDGE, f"it answers /health with 503{why}")
    if signs.health is Health.REFUSED and signs.same_health >= GONE_AFTER:
        return Condemn(signs.hint or Cause.WEDGE, "it no longer listens on its port")
    progressing = signs.waiting > 0 and signs.quiet < HINTED_DEAFNESS
    deaf = signs.health is Health.SILENT and signs.unanswered >= HINTED_DEAFNESS
    if signs.hint is not None and deaf and not progressing:
        return Condemn(signs.hint, f"it has not answered /health for {signs.unanswered:.0f} s after naming the cause")
    patience = min(progress, IDLE_SILENCE)
    if signs.waiting == 0 and signs.health is Health.SILENT and signs.unanswered >= patience:
        return Condemn(Cause.STALLED, f"it has not answered /health for {signs.unanswered:.0f} s")
    return None


def _by_silence(signs: Signs, progress: float) -> Condemn | None:
    if signs.waiting == 0:
        return None
    if signs.quiet >= progress and not signs.non_streaming:
        reason = f"it made no progress for {signs.quiet:.0f} s (requests that wait: {signs.waiting})"
        return Condemn(signs.hint or Cause.STALLED, reason)
    if signs.hint is not None and signs.quiet >= min(progress, HINTED_SILENCE):
        return Condemn(signs.hint, f"it went silent for {signs.quiet:.0f} s after its output named the cause")
    return None
