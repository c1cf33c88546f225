"""Which replica may be loaded, when, and which model is evicted for it: values in, one decision out.

    Grant    enough memory is free, and it is the replica's turn
    Release  what other processes hold without a use for it: freed buffers, and prompt caches beyond their share
    Evict    a load that no request waits for any more; else an idle model, least recently used first; a busy one is
             drained first
    Wait     until other replicas have loaded, ended or drained
    Refuse   not enough memory even with all evictable models evicted; with the numbers
    Withdraw no request needs the replica any more, or it was told to stop

One load at a time, because a load takes more than the loaded model; a second load runs beside it only where twice its
need is free. The process of an evicted model has ended, and its memory is free again, before the next load begins.

Released memory is waited for ``RELEASE_PATIENCE`` at most, where it is enough: a process that is busy, or hangs, gives
it back late or never. No model is unloaded before that.

A model with requests in flight or queued is evicted only when another replica has waited ``MIN_WAIT_TO_EVICT_BUSY``
and the model has been ready for ``MIN_RESIDENCY``. A second replica of a model evicts no model, nor does a model that
has only failed so far. Pinned models are never evicted.

Pure: no I/O, no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from backends.domain.snapshot import WAITS_FOR_MEMORY
from backends.domain.state import State
from backends.memory import units

MIN_WAIT_TO_REFUSE = 1.5  # seconds of measuring, without a process that ends, before a load is refused
RELEASE_PATIENCE = 3.0  # seconds; mlx releases its pool at once, a busy server its prompt cache after a step
RELEASE_AGAIN = 0.5  # seconds: what the prompt cache gives back becomes freed buffers first
MIN_RELEASE = 16 << 20  # bytes of one process that are worth a command
MIN_RESIDENCY = 2.0  # seconds that a busy model is ready before it is evicted
MIN_WAIT_TO_EVICT_BUSY = 5.0  # seconds that another replica waits before a busy model is evicted


@dataclass(frozen=True, slots=True)
class Holding:
    """One replica that was granted memory. ``charge``: bytes; its grant or its footprint, whichever is larger.
    ``spare``: bytes of the charge that it would give back if it was told to."""

    id: str
    model: str
    charge: int
    state: State
    evictable: bool
    evicting: bool  # being drained so that another replica can load
    inflight: int  # client requests
    demand: bool  # requests are queued for its model
    pressing: bool  # queued requests, an operator or the configuration need it now
    used_at: float
    ready_at: float
    spare: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """One replica that asks for memory. ``need``, ``least``: bytes; ``least`` is the minimum to run, since ``need`` may
    be the highest footprint ever measured, with prompt caches in it."""

    id: str
    model: str
    pinned: bool
    need: int
    least: int
    waited: float  # seconds
    wanted: bool  # still to be loaded: not told to stop, and the requests that it was loaded for still wait
    pressing: bool  # queued requests, an operator or the configuration need it now: it may evict others
    failing: bool  # has only failed lately, was never ready: it may evict no other


@dataclass(frozen=True, slots=True)
class Released:
    """Seconds since all were told to release memory for a claim, for the ``first`` and the ``last`` time; ``promised``:
    bytes that they had to spare at the first time."""

    first: float
    last: float
    promised: int


@dataclass(frozen=True, slots=True)
class Memory:
    """``free``: bytes that may still be granted. ``budget``: bytes for all models; None = the machine's available
    memory. ``settled``: seconds since a process last ended, because its memory may be freed late. ``holder``: who else
    holds memory that is missing, for users. ``released``: for this claim; None = nothing yet."""

    free: int
    budget: int | None
    settled: float
    holder: str = ""
    released: Released | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    size: int


@dataclass(frozen=True, slots=True)
class Release:
    ids: tuple[str, ...]  # that have something to spare


@dataclass(frozen=True, slots=True)
class Evict:
    id: str


@dataclass(frozen=True, slots=True)
class Wait:
    what: str  # for users
    for_others: bool = False  # memory is held by processes that are not ours


@dataclass(frozen=True, slots=True)
class Refuse:
    message: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    pass


Decision = Grant | Release | Evict | Wait | Refuse | Withdraw

_LOADING = frozenset({State.STARTING, State.WAITING_FOR_MEMORY})

WAITS_FOR_TURN = "waits for its turn to load"
WAITS_FOR_OTHERS = "waits for other models to be unloaded"
WAITS_FOR_RELEASE = "waits for other models to release memory that they do not use"


def decide(claim: Claim, holdings: Sequence[Holding], memory: Memory, *, its_turn: bool, now: float) -> Decision:
    """``its_turn``: no claim with precedence is waiting."""
    if not claim.wanted:
        return Withdraw()
    evictable = _evictable(claim, holdings)
    ending = [other for other in holdings if other.state is State.STOPPING]
    staying = [other for other in holdings if other not in evictable and other not in ending]
    most = memory.free + sum(other.charge for other in holdings if other not in staying)
    most += sum(other.spare for other in staying)
    # The highest footprint ever measured need not be reached today.
    need = claim.least if claim.least <= most < claim.need else claim.need
    loading = any(other.state in _LOADING for other in holdings)
    if need <= memory.free and (2 * need <= memory.free or (its_turn and not loading)):
        return Grant(need)
    abandoned = [other for other in evictable if other.state in _LOADING and not other.pressing]
    if abandoned and claim.pressing and its_turn:
        return Evict(abandoned[0].id) if not ending else Wait(WAITS_FOR_OTHERS)
    if need <= memory.free or loading or not its_turn:
        return Wait(WAITS_FOR_TURN)
    if not claim.pressing:
        return Withdraw()
    if (release := _release(need - memory.free, holdings, memory.released)) is not None:
        return release
    if most < need:
        measured = not ending and min(claim.waited, memory.settled) >= MIN_WAIT_TO_REFUSE
        sure = memory.budget is not None or measured
        return Refuse(_refusal(claim.id, need, holdings, memory)) if sure else Wait(WAITS_FOR_MEMORY)
    victim = None if ending else _victim(evictable, claim.waited, now)
    return Wait(WAITS_FOR_OTHERS) if victim is None else Evict(victim)


def _evictable(claim: Claim, holdings: Sequence[Holding]) -> list[Holding]:
    """The replicas that may be evicted for ``claim``."""
    if claim.failing or any(other.model == claim.model for other in holdings):
        return []
    return [other for other in holdings if other.evictable]


def _release(missing: int, holdings: Sequence[Holding], released: Released | None) -> Release | Wait | None:
    """What comes before an eviction, or a refusal; None = nothing."""
    spare = {other.id: other.spare for other in holdings if other.spare >= MIN_RELEASE}
    if spare and released is None:
        return Release(tuple(spare))
    if released is None or released.first >= RELEASE_PATIENCE:
        return None
    if max(released.promised, sum(spare.values())) < missing:
        return None
    return Release(tuple(spare)) if spare and released.last >= RELEASE_AGAIN else Wait(WAITS_FOR_RELEASE)


def _victim(evictable: Sequence[Holding], waited: float, now: float) -> str | None:
    """The replica to evict now. One at a time: the memory of one that is ending is measured first."""
    evicting = [other for other in evictable if other.evicting]
    if any(not other.inflight for other in evicting):
        return None
    ready = [other for other in evictable if other.state is State.READY]
    idle = [other for other in ready if not other.inflight and not other.demand]
    if idle:
        return min(idle, key=lambda other: other.used_at).id
    if ready and waited >= MIN_WAIT_TO_EVICT_BUSY and not evicting:
        longest = min(ready, key=lambda other: other.ready_at)
        return longest.id if now - longest.ready_at >= MIN_RESIDENCY else None
    return None


def _refusal(name: str, need: int, holdings: Sequence[Holding], memory: Memory) -> str:
    whole = "what the machine can give now" if memory.budget is None else f"the budget of {units.memory(memory.budget)}"
    held = ", ".join(map(_told, holdings)) or "nothing"
    return (
        f"{name} needs about {units.memory(need)}, and {units.memory(max(0, memory.free))} of {whole} are left "
        f"(loaded: {held}{memory.holder}); use a smaller model, raise memory.budget, or correct the model's memory:"
    )


def _told(other: Holding) -> str:
    unused = f", of it {units.memory(other.spare)} unused" if other.spare >= MIN_RELEASE else ""
    return f"{other.id} {units.memory(other.charge)}{unused}"
