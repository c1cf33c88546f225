"""The memory of one replica's batch: which requests fit, what is dropped for them, who is stopped when it grows.

Brings together what the process tells of itself (its report), the replica's share of the memory (``engine_memory``) and
the cost of a batch (``admission.memory_gate``).
"""

import logging
from collections.abc import Callable

from backends.admission.inflight import InFlight
from backends.admission.memory_gate import MemoryGate, Shortage
from backends.admission.slot_request import SlotRequest
from backends.domain.prompt_bound import PromptBound
from backends.domain.report import EngineReport
from backends.domain.snapshot import Seat
from backends.domain.spec import BackendSpec
from backends.memory.kv_cost import KvCost
from backends.replica.engine_memory import EngineMemory
from backends.upstream.exchange import ExchangeError, Fault

log = logging.getLogger(__name__)


class BatchMemory:
    """Over all processes of the replica. ``cost``: of a batch, None = not known; ``report``: of the present process,
    None = there is none. ``spec.admission`` off: every request fits."""

    def __init__(
        self,
        spec: BackendSpec,
        inflight: InFlight,
        engine: EngineMemory,
        *,
        cost: Callable[[], KvCost | None],
        report: Callable[[], EngineReport | None],
        clock: Callable[[], float],
    ) -> None:
        self._spec = spec
        self._inflight = inflight
        self._engine = engine
        self._report = report
        self._cost = cost if spec.admission else lambda: None
        self._gate = MemoryGate(
            inflight,
            cost=self._cost,
            room=lambda: engine.room(report()),
            clock=clock,
            report=report,
        )

    @property
    def is_known(self) -> bool:
        """What a batch needs, and what it may take: then ``fits`` bounds it."""
        return self._engine.room(None) is not None and self._cost() is not None

    def fits(self, request: SlotRequest, generation: int, share: float) -> bool:
        return self._gate.fits(request.work, lambda: request.cached_on(Seat(self._spec.id, generation)), share)

    def shortage(self, request: SlotRequest, generation: int) -> Shortage | None:
        return self._gate.shortage(request.work, lambda: request.cached_on(Seat(self._spec.id, generation)))

    @property
    def prompt_bound(self) -> PromptBound | None:
        share = self._engine.share
        known = share is not None and share.limit is not None  # else it has less than it needs, and may swap
        return self._gate.prompt_bound(share.flexible if known and share is not None else None)

    def admitted(self) -> None:
        """A request was admitted: before it is sent, what is cached in the place of its batch is dropped."""
        if self._spec.admission and (report := self._report()) is not None:
            self._engine.make_room(report, lambda: self._gate.need)

    def answered(self) -> None:
        self._gate.answered()

    def ran_out(self) -> None:
        """Memory ran out, and not because of other programs. The requests are still in flight."""
        self._gate.ran_out()

    @property
    def look_again(self) -> bool:
        """Once: a request was refused for what the engine told at that moment."""
        doubted, self._gate.doubted = self._gate.doubted, False
        return doubted

    def stop_growth(self) -> None:
        """Before the batch grows beyond its memory: what is cached is dropped in its place, as far as is needed; where
        that is not enough, some of its requests are aborted."""
        report = self._report()
        if report is not None and (beside := self._engine.beside(report)) is not None:
            need = self._gate.soon(beside)
            if need is not None:
                self._engine.make_room(report, lambda: need, all_of_it=True)
        leases = self._gate.growing(self._engine.most(report))
        if not leases:
            return
        batch = f"the batch of {len(self._inflight)} would need {self._gate.told}"
        log.warning("requests are stopped", extra={"backend": self._spec.id, "requests": len(leases), "reason": batch})
        for lease in leases:
            lease.abort(ExchangeError(Fault.CROWDED, batch))
