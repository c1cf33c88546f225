"""What to launch or to reach, and how to judge it. Pure values; durations in seconds, sizes in bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from backends.domain.failure import Codes


@dataclass(frozen=True, slots=True)
class Timeouts:
    start: float = 600.0  # from spawn to the first proven token
    progress: float = 120.0  # silence while requests are in flight
    total: float = 0.0  # one request, all attempts; 0 = none
    stop: float = 20.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    min_backoff: float = 1.0
    max_backoff: float = 60.0
    max_failures: int = 5  # within ``window``, then the backend gives up
    window: float = 300.0


@dataclass(frozen=True, slots=True)
class Launch:
    """A process of ours. ``argv`` may hold ``{host}``, ``{port}`` and ``{model}``, filled in for each life."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # added to our own environment
    host: str = "127.0.0.1"
    port: int = 0  # 0 = a free one, chosen anew for each life
    model_folder: str | None = None  # checked before launch where the model is a local path


@dataclass(frozen=True, slots=True)
class Remote:
    """A server that already runs, ours or another gateway. ``url`` has no trailing slash and no ``/v1``."""

    url: str
    api_key: str = ""


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """One replica."""

    id: str  # NAME:INDEX
    model: str  # the public name
    index: int
    upstream_model: str  # the one string sent as ``model``: a second name for the same model would not batch
    target: Launch | Remote
    is_mlx: bool = True  # mlx_lm.server itself, so its quirks apply
    max_inflight: int = 8
    timeouts: Timeouts = Timeouts()
    restart: RestartPolicy = RestartPolicy()
    on_demand: bool = False  # loaded by the first request, not at the start
    idle_unload: float = 0.0  # seconds without requests; 0 = it stays
    memory: int | None = None  # bytes that it needs, as the operator says; also what it should not go beyond
    codes: Codes = field(
        default_factory=dict
    )  # what the error codes of its answers mean, where it is a gateway like this one
    memory_host: str = ""  # whose memory it uses: "" = this machine's, that all our own processes share

    @property
    def pinned(self) -> bool:
        """It never has to give way to another model."""
        return not self.on_demand and not self.idle_unload
