"""What the state machine of a replica (``lifecycle``) takes and gives: commands, events, effects.

Commands say what is wanted; ``Start``, ``Stop``, ``Restart``, ``Drain`` are the operator's, the others come from demand
and memory. Events are past tense, and carry the generation of the instance that they are about. Effects are orders.

Pure: values only.
"""

from dataclasses import dataclass

from backends.domain.failure import Failure
from backends.domain.state import StartReason

# -- commands of the operator ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    pass


@dataclass(frozen=True, slots=True)
class Stop:
    pass


@dataclass(frozen=True, slots=True)
class Restart:
    pass


@dataclass(frozen=True, slots=True)
class Drain:
    pass


# -- commands of demand and memory -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    reason: StartReason


@dataclass(frozen=True, slots=True)
class Unload:
    """Finish the requests in flight, then unload; a request cancels it. ``demand``: requests are queued: they do not
    cancel it, and the model is loaded again for them. A load in progress is ended even if requests wait for it."""

    demand: bool


@dataclass(frozen=True, slots=True)
class Evict:
    """Like ``Unload``, for other models that wait: requests do not cancel it, they wait until it is loaded again.

    A load in progress is ended. Once memory is free, the replica is loaded again if others of its model are ready."""


@dataclass(frozen=True, slots=True)
class Recycle:
    """Finish the requests in flight, then start a new process."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Cancels an eviction or a recycling whose process is not being terminated yet."""


# -- events: past tense ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Waiting:
    """The launch waits for memory. ``what``: a text for users, e.g. "waits for other models to be unloaded"."""

    generation: int
    what: str


@dataclass(frozen=True, slots=True)
class Granted:
    generation: int


@dataclass(frozen=True, slots=True)
class Launched:
    """The process exists."""

    generation: int


@dataclass(frozen=True, slots=True)
class Proven:
    """``downloaded``: the start has also fetched the model."""

    generation: int
    downloaded: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """A client's request was answered in full."""

    generation: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The instance is condemned, or could not start. Its process, if there is one, still has to be terminated."""

    generation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Exited:
    """The process has ended and was reaped. ``failure``: applies if the gateway had not requested the end."""

    generation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Declined:
    """No process was launched: no memory, or no longer needed. Not a failure of the replica. ``retry``: seconds; None =
    not before the next request."""

    generation: int
    failure: Failure
    retry: float | None


@dataclass(frozen=True, slots=True)
class Emptied:
    """No request is in flight. ``demand``: requests are queued for the model."""

    generation: int
    demand: bool


@dataclass(frozen=True, slots=True)
class Woke:
    """``wanted``: the model should still be loaded: for queued requests, or by configuration or the operator."""

    generation: int
    wanted: bool


@dataclass(frozen=True, slots=True)
class Mended:
    """What the replica failed on has changed, or, with ``unseen``, may have. ``wanted``: as in ``Woke``."""

    generation: int
    wanted: bool
    unseen: bool = False


OperatorCommand = Start | Stop | Restart | Drain
Command = OperatorCommand | Load | Unload | Evict | Recycle | Keep
Event = (
    Command | Mended | Waiting | Granted | Launched | Proven | Answered | Failed | Exited | Declined | Emptied | Woke
)


# -- effects: orders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    generation: int


@dataclass(frozen=True, slots=True)
class Terminate:
    """End the process, or the launch if there is no process yet."""

    generation: int


@dataclass(frozen=True, slots=True)
class AbortCalls:
    """End every request in flight on this instance now, with this failure."""

    generation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class WakeAfter:
    generation: int
    delay: float


@dataclass(frozen=True, slots=True)
class Watch:
    """It would fail again in the same way: look whether what it failed on has changed."""

    generation: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The command is not possible in this state."""

    reason: str


Order = Spawn | Terminate | AbortCalls | WakeAfter | Watch
Effect = Order | Refuse
