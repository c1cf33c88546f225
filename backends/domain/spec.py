"""What to launch or connect to, with its limits. Pure values; durations in seconds, sizes in bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from backends.domain.engine import Engine
from backends.domain.failure import Codes
from backends.domain.secrets import NO_SECRETS, Secrets


@dataclass(frozen=True, slots=True)
class Timeouts:
    start: float = 600.0  # from spawn to the first token of the readiness probe
    progress: float = 120.0  # silence while requests are in flight
    total: float = 0.0  # one request, all attempts; 0 = none
    stop: float = 20.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    min_backoff: float = 1.0
    max_backoff: float = 60.0
    max_failures: int = 5  # of one hopeless cause: the replica is given up; any within ``window``: it is crash looping
    window: float = 300.0


@dataclass(frozen=True, slots=True)
class Launch:
    """A process that the gateway starts. ``argv`` may hold ``{host}``, ``{port}`` and ``{model}``, filled in for each
    instance."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # added to our own environment
    host: str = "127.0.0.1"
    port: int = 0  # 0 = a free port, chosen anew for each instance
    model_folder: str | None = None  # checked before launch if the model is a local path
    model: str = ""  # a hub name: its snapshot is looked at after a failed start
    instrumented: bool = False  # it runs under ``instrument/instrument.py``, which gets a channel


PROXY_AUTO = "auto"  # as the environment says, but no proxy for hosts of our own network
PROXY_DIRECT = "direct"  # none


@dataclass(frozen=True, slots=True)
class Remote:
    """A server that the gateway does not start, or another gateway. ``url`` has no trailing slash and no ``/v1``.
    ``proxy``: one of the two above, or the URL of a proxy."""

    url: str
    api_key: str = ""
    proxy: str = PROXY_AUTO


@dataclass(frozen=True, slots=True)
class EngineBatch:
    """What mlx_lm.server takes at once, by its flags: ``members`` of its batch, and of these, ``prompts`` that are read
    together. The rest waits in the server."""

    members: int
    prompts: int


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """One replica."""

    id: str  # NAME:INDEX
    model: str  # the public name
    index: int
    upstream_model: str  # its name there, as configured; see ``diagnosis.engine`` for the one that is sent
    target: Launch | Remote
    engine: Engine = Engine.MLX_LM  # as configured; OTHER = to be learned from what it says
    max_inflight: int | None = 8  # None = auto (``inflight_limit``)
    timeouts: Timeouts = Timeouts()
    restart: RestartPolicy = RestartPolicy()
    on_demand: bool = False  # loaded by the first request, not at the start
    idle_unload: float = 0.0  # seconds without requests; 0 = never
    memory: int | None = None  # bytes, as configured: its need, and the limit beyond which it is recycled
    codes: Codes = field(default_factory=dict)  # meaning of its error codes, if it is a gateway like this one
    admission: bool = True  # by the memory of the batch, as far as it is known
    batches: bool = True  # known to answer several requests at a time
    engine_batch: EngineBatch | None = None  # None = not known, as of another server than mlx_lm.server
    named: bool = True  # ``upstream_model`` was chosen for that server; else it is the public name
    secrets: Secrets = NO_SECRETS  # of the whole config, to be kept out of what others write
    memory_host: str = ""  # the host whose memory it uses; "" = this machine, shared by all our own processes

    @property
    def pinned(self) -> bool:
        """Never evicted for another model."""
        return not self.on_demand and not self.idle_unload
