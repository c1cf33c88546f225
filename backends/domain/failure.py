"""The values of failure: what happened to a replica, to one request on it, and what an upstream said.

Cause and aftermath are two axes: the same cause (out of memory, say) leaves a process exited, wedged or alive,
depending on the versions of mlx and mlx-lm. No code here derives one from the other.

Pure: no I/O, no clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class Cause(StrEnum):
    """Why. The values are public: health, ``explain``, metrics and logs show them."""

    OOM = "oom"
    RESOURCE_LIMIT = "resource_limit"
    GPU_TIMEOUT = "gpu_timeout"
    GPU_VICTIM = "gpu_victim"
    GPU_FAULT = "gpu_fault"
    LOAD_FAILURE = "load_failure"
    MODEL_NOT_FOUND = "model_not_found"
    DOWNLOAD = "download"
    DISK_FULL = "disk_full"
    PORT_IN_USE = "port_in_use"
    DEPENDENCY = "dependency"
    DISTRIBUTED = "distributed"
    WEDGE = "wedge"
    NATIVE_CRASH = "native_crash"
    KILLED = "killed"
    STALLED = "stalled"
    START_TIMEOUT = "start_timeout"
    UNREACHABLE = "unreachable"
    # Output that is no failure of the backend.
    CLIENT_GONE = "client_gone"
    BAD_REQUEST = "bad_request"
    NONE = "none"


HARMLESS = frozenset({Cause.CLIENT_GONE, Cause.BAD_REQUEST, Cause.NONE})


class Aftermath(StrEnum):
    """What is left of the process."""

    EXITED = "exited"
    WEDGED = "wedged"  # HTTP answers, generation does not
    ALIVE = "alive"
    UNKNOWN = "unknown"
    NOT_LAUNCHED = "not_launched"  # no process was started


class Blame(StrEnum):
    """Who caused the failure, as far as it is known."""

    REQUEST = "request"  # this request alone: the backend goes on
    BACKEND = "backend"
    MACHINE = "machine"  # another process on the same GPU, the memory of the whole machine
    OPERATOR = "operator"  # only a changed config, model folder or disk helps
    GATEWAY = "gateway"  # the gateway stopped the process itself


class Sent(StrEnum):
    """Whether the backend can have begun to work on the request."""

    NOTHING = "nothing"
    MAYBE = "maybe"


class Reason(StrEnum):
    """Why a request was not taken or failed, where the cause alone does not say it. Internal: health and logs show the
    cause."""

    BUSY = "busy"  # the server has no capacity left at the moment
    NO_MEMORY = "no_memory"  # the model was not launched: its memory cannot be had
    TOO_LARGE = "too_large"  # the body, for that server
    EMPTY_PROMPT = "empty_prompt"  # a prompt of which there was nothing to read ended the generation thread
    PROMPT_CACHED = "prompt_cached"  # the whole prompt is in the prompt cache: the server cannot answer it
    EXHAUSTED = "exhausted"  # the gateway had no descriptors, processes or memory left for a launch: that passes
    CROWDED_OUT = "crowded_out"  # out of memory, because processes that are not ours hold what it needs: that passes
    NO_ROOM = "no_room"  # stopped, as the batch that it was in grew beyond the memory
    OCCUPIED = "occupied"  # silent because of another request
    LOST_CALL = "lost_call"  # the answer claims a tool call that is not in it
    CUT_CALL = "cut_call"  # a tool call was cut off by max_tokens, and is not in the answer


@dataclass(frozen=True, slots=True)
class CodeMeaning:
    """What an error code of another gateway, upstream, says about the backend that answered. ``sent``: whether a
    backend behind it can have begun to work on the request."""

    cause: Cause
    blame: Blame = Blame.BACKEND
    sent: Sent = Sent.MAYBE


Codes = Mapping[str, CodeMeaning]  # the table itself is the gateway's, and is handed in
NO_CODES: Codes = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Failure:
    """What happened to a replica: to its process, or to the server at its address.

    ``message`` is one sentence for people, without a trailing full stop; ``evidence`` the lines of output it rests on,
    oldest first; ``exit`` the process's returncode as Python gives it (negative: signal), None while the process runs.
    """

    cause: Cause
    aftermath: Aftermath
    message: str
    blame: Blame = Blame.BACKEND
    backend: str = ""
    generation: int = 0
    evidence: tuple[str, ...] = field(default=())
    exit: int | None = None
    shared: bool = False  # the same incident as a sibling's failure, e.g. a GPU reset: not counted again
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class UpstreamReport:
    """What another gateway, upstream, says of a request that it could not answer; its own words are kept."""

    code: str | None = None
    param: str | None = None  # the request field to blame
    retry_after: float | None = None  # seconds
    no_retry: bool = False  # this request should not be sent again


@dataclass(frozen=True, slots=True)
class CallFailure:
    """What happened to one request on a replica. ``verdict``: on the replica, or, where that goes on, on this call
    alone."""

    verdict: Failure
    sent: Sent = Sent.MAYBE
    truncated: bool = False  # the answer just ended; no cause was established
    suspect: bool = False  # this request may have caused the failure (see ``diagnosis.suspects``)
    alone: bool = False  # and no other was in flight; where memory ran out, neither on others that share it
    inflight: int = 0  # requests in flight on the replica when it failed, this one included; 0 = not known
    beside: int = 0  # requests in flight on other replicas that share its memory
    doubtful: bool = False  # blamed on the request, but it may as well be the server's failure
    upstream: UpstreamReport = UpstreamReport()

    @property
    def crowd(self) -> int:
        """Requests in flight that shared the memory, this one included; 0 = not known."""
        return self.inflight + self.beside
