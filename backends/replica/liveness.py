"""Liveness of a replica that was ready: (signs) -> healthy, ask the canary, or condemn.

    /health answers 503                       condemn   (mlx-lm 0.32.0 and later: the generation thread is dead)
    the process itself tells of that death    condemn
    the connection is refused, repeatedly     condemn
    requests in flight, silence               condemn after ``timeouts.progress``; sooner if the output names a cause,
                                              by the rhythm of its model (``Signs.deadline``), or if it is stopped
      ... which an abandoned request explains move the others to another replica
    an answer in one piece is overdue         ask for one token: the canary
    an abandoned request should have ended,
    nothing in flight                         likewise
    nothing in flight, /health is silent      condemn after 30 s at most: a stopped process, a machine that thrashes
    output names a cause, or a client left
    after a long silence, nothing in flight   ask for one token: the canary
    the canary failed                         condemn

Text alone never condemns: a client can have any line printed in the log (an invalid body is logged raw). Silence,
``/health`` or the canary has to confirm it. A busy backend is never probed with work. "Condemn" means: a supervised
replica's process is replaced, a remote replica is unreachable until it generates a token.

Pure: no I/O, no clock.
"""

from dataclasses import dataclass

from backends.domain.failure import Cause
from backends.domain.state import Health

HINTED_SILENCE = 20.0  # seconds without progress; enough if the output names a cause
HINTED_UNANSWERED = 5.0  # seconds without an answer to /health; enough if, besides, no request makes progress
STOPPED_SILENCE = 10.0  # seconds without progress; enough if the process is stopped
IDLE_UNANSWERED = 30.0  # seconds without an answer to /health, nothing in flight
REFUSALS_TO_CONDEMN = 3  # refused connections in a row
FOREIGN_503S_TO_CONDEMN = 5  # 503s in a row from a server that is not mlx_lm.server: one may just mean "busy"


@dataclass(frozen=True, slots=True)
class Signs:
    """Durations in seconds.

    ``inflight``: number of requests in flight, without abandoned ones. ``waiting``: number of them that wait for the
    backend (the clients of the others do not read). ``one_piece``: these could not have received anything yet,
    their answers come in one piece. ``quiet``: time in which no request received anything while at least one waited,
    without that in which the process was at work and others had the cores.
    ``unanswered``: time since the last answer to ``/health``. Neither counts while a long prompt may be tokenised.
    ``hint``: a cause in the output since the replica was last shown to generate.

    ``overdue``: an answer in one piece takes longer than its tokens at the slowest rate seen. ``occupied``: an
    abandoned request may hold up all others. ``unproven``: an abandoned request should have ended.

    ``silence``: time in which no request received anything, the output told of no progress, and the process did
    nothing. ``deadline``: silence that is too long by what the replica has shown before; None = nothing is known of
    such work. ``stopped``: the process is stopped by a signal. ``withheld``: it is at work, and that may be a tool call
    which is not sent before it is whole. ``thread_ended``: the instrument in the process has told that the generation
    thread has ended.
    """

    inflight: int
    waiting: int
    one_piece: bool
    quiet: float
    health: Health
    same_health: int  # number of probes in a row with this result
    unanswered: float
    hint: Cause | None
    suspected: bool  # a client left after a long silence
    canary_failed: bool
    overdue: bool = False
    occupied: bool = False
    unproven: bool = False
    silence: float = 0.0
    deadline: float | None = None
    stopped: bool = False
    withheld: bool = False
    thread_ended: bool = False


@dataclass(frozen=True, slots=True)
class Healthy:
    pass


@dataclass(frozen=True, slots=True)
class AskCanary:
    pass


@dataclass(frozen=True, slots=True)
class Move:
    """Take the waiting requests from the replica, which goes on."""


@dataclass(frozen=True, slots=True)
class Condemn:
    cause: Cause
    reason: str  # a clause that begins with "it"


Finding = Healthy | AskCanary | Move | Condemn


def assess(signs: Signs, *, progress: float, is_mlx: bool, load: float = 0.0) -> Finding:
    """``progress``: seconds of silence that are no stall, ``timeouts.progress`` or more; ``load``: seconds of silence
    in which a remote server may be loading the model, 0.0 = the model is loaded."""
    unhealthy = _by_health(signs, progress, is_mlx=is_mlx)
    if unhealthy is not None:
        return unhealthy
    silent = _by_silence(signs, max(progress, load))
    if silent is not None:
        return Move() if signs.occupied else silent
    if signs.canary_failed:
        return Condemn(signs.hint or Cause.WEDGE, "it answers HTTP but generates nothing")
    idle = signs.inflight == 0
    if signs.overdue or (idle and (signs.hint is not None or signs.suspected or signs.unproven)):
        return AskCanary()
    return Healthy()


def _by_health(signs: Signs, progress: float, *, is_mlx: bool) -> Condemn | None:
    if signs.health is Health.UNAVAILABLE and (is_mlx or signs.same_health >= FOREIGN_503S_TO_CONDEMN):
        why = ": its generation thread is dead" if is_mlx else ""
        return Condemn(signs.hint or Cause.WEDGE, f"it answers /health with 503{why}")
    if signs.thread_ended:
        return Condemn(signs.hint or Cause.WEDGE, "its generation thread has ended")
    if signs.health is Health.REFUSED and signs.same_health >= REFUSALS_TO_CONDEMN:
        return Condemn(signs.hint or Cause.WEDGE, "it no longer listens on its port")
    progressing = signs.waiting > 0 and signs.quiet < HINTED_UNANSWERED
    unanswered = signs.health is Health.SILENT and signs.unanswered >= HINTED_UNANSWERED
    if signs.hint is not None and unanswered and not progressing:
        reason = f"it has not answered /health for {signs.unanswered:.0f} s after its output named the cause"
        return Condemn(signs.hint, reason)
    limit = min(progress, IDLE_UNANSWERED)
    if signs.waiting == 0 and signs.health is Health.SILENT and signs.unanswered >= limit:
        return Condemn(Cause.STALLED, f"it has not answered /health for {signs.unanswered:.0f} s")
    return None


def _by_silence(signs: Signs, progress: float) -> Condemn | None:
    if signs.waiting == 0:
        return None
    if signs.quiet >= progress and not (signs.one_piece or signs.withheld):
        reason = f"it made no progress for {signs.quiet:.0f} s (waiting requests: {signs.waiting})"
        return Condemn(signs.hint or Cause.STALLED, reason)
    if signs.stopped and signs.silence >= min(progress, STOPPED_SILENCE):
        reason = f"its process is stopped, as by SIGSTOP (no progress for {signs.silence:.0f} s)"
        return Condemn(signs.hint or Cause.STALLED, reason)
    if signs.deadline is not None and signs.silence >= min(progress, signs.deadline) and not signs.one_piece:
        usual = f"{signs.deadline:.0f} s is the most by what it has shown before"
        reason = f"it made no progress for {signs.silence:.0f} s, and {usual} (waiting requests: {signs.waiting})"
        return Condemn(signs.hint or Cause.STALLED, reason)
    if signs.hint is not None and signs.quiet >= min(progress, HINTED_SILENCE):
        return Condemn(signs.hint, f"it went silent for {signs.quiet:.0f} s after its output named the cause")
    return None
