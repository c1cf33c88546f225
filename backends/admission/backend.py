"""One replica, supervised or remote, as admission and the fleet see it."""

from collections.abc import Iterable
from typing import Protocol

from backends.admission.inflight import InFlight
from backends.admission.lease import Changed, Lease
from backends.admission.memory_gate import Shortage
from backends.admission.slot_request import SlotRequest
from backends.domain.engine import Engine
from backends.domain.inflight_limit import InflightLimit
from backends.domain.prompt_bound import PromptBound
from backends.domain.report import EngineReport
from backends.domain.snapshot import Snapshot
from backends.domain.spec import BackendSpec
from backends.domain.state import State


class Backend(Protocol):
    on_change: Changed
    spec: BackendSpec

    @property
    def id(self) -> str: ...

    @property
    def state(self) -> State: ...

    @property
    def inflight(self) -> int:
        """Slots taken, abandoned requests included."""
        ...

    @property
    def abandoned(self) -> int: ...

    @property
    def flight(self) -> InFlight:
        """Its requests in flight, and what they have taught."""
        ...

    @property
    def engine(self) -> Engine: ...

    @property
    def generation(self) -> int: ...

    @property
    def report(self) -> EngineReport | None:
        """What its process tells of itself."""
        ...

    @property
    def responsive(self) -> bool: ...

    @property
    def is_up_or_starting(self) -> bool: ...

    @property
    def recovers(self) -> bool:
        """It is ready, or will be without a person or a new request: it is loaded, or restarted after a failure."""
        ...

    @property
    def unloaded(self) -> bool:
        """The model is not loaded, because no request needed it."""
        ...

    @property
    def loading_on_demand(self) -> bool: ...

    @property
    def recently_denied(self) -> bool:
        """A load was refused memory a moment ago."""
        ...

    def set_demand(self, queued: int, *, accompanied: bool) -> None:
        """``queued``: requests that are queued for the model. ``accompanied``: another replica of it is ready."""
        ...

    def look_again(self) -> None:
        """A request came for which there is no replica: if this one was given up, look whether its cause is mended."""
        ...

    def load(self) -> None:
        """Load the model for the queued requests, if it is unloaded."""
        ...

    @property
    def limit(self) -> InflightLimit:
        """Of its requests in flight, when nothing is wrong."""
        ...

    def has_slot(self) -> bool: ...

    def fits(self, request: SlotRequest, share: float = 1.0) -> bool:
        """Its batch, with this request in it, fits this share of the memory that it may take, as far as is known."""
        ...

    def shortage(self, request: SlotRequest) -> Shortage | None:
        """What is missing for ``request``; None: it fits."""
        ...

    @property
    def prompt_bound(self) -> PromptBound | None:
        """The longest prompt that its memory can take; None = not known."""
        ...

    def admit(self) -> Lease: ...

    def snapshot(self) -> Snapshot: ...


def sharing_memory(backend: Backend, backends: Iterable[Backend]) -> list[Backend]:
    """Those that use the same memory, itself included."""
    return [other for other in backends if other.spec.memory_host == backend.spec.memory_host]
