"""How many requests may be in flight on one replica at once, and why so many: (spec, is the memory known) -> limit.

    written in the config       that number
    auto, memory known          as many as fit the memory (``admission.memory_gate``), and at most what mlx_lm.server
                                takes at once: so many sequences in its batch, so many prompts read together. What comes
                                beyond that would wait in the server, which says nothing of it: it looks like silence,
                                cannot be moved to another replica, and goes before more urgent requests that come later
    auto, else                  ``UNBOUNDED``: nothing else would bound the memory of the batch

Pure.
"""

from dataclasses import dataclass

from backends.domain.engine import Engine
from backends.domain.spec import BackendSpec, Remote

UNBOUNDED = 8


@dataclass(frozen=True, slots=True)
class InflightLimit:
    """``requests`` in flight; ``unread``: of these, those whose prompts are not read yet, None = all; ``why``: for
    people."""

    requests: int
    why: str
    unread: int | None = None


SEQUENTIAL = InflightLimit(1, "the server answers one request after the other")


@dataclass(frozen=True, slots=True)
class InflightLimits:
    """Of one replica: the ``usual`` limit, and the one that holds while the memory of a batch is known."""

    usual: InflightLimit
    by_memory: InflightLimit

    @property
    def most(self) -> int:
        """Requests that may ever be in flight at once."""
        return max(self.usual.requests, self.by_memory.requests)


def inflight_limits(spec: BackendSpec) -> InflightLimits:
    written, batch = spec.max_inflight, spec.engine_batch
    if spec.engine is Engine.MLX_LM and not spec.batches:
        return InflightLimits(SEQUENTIAL, SEQUENTIAL)
    if written is not None:
        configured = InflightLimit(written, "as configured")
        return InflightLimits(configured, configured)
    usual = InflightLimit(UNBOUNDED if batch is None else min(UNBOUNDED, batch.members), f"auto, {_unknown(spec)}")
    if batch is None or not spec.admission:
        return InflightLimits(usual, usual)
    why = "auto, as many as fit the memory together, and at most what the server decodes together"
    return InflightLimits(usual, InflightLimit(batch.members, why, unread=batch.prompts))


def _unknown(spec: BackendSpec) -> str:
    if isinstance(spec.target, Remote):
        return "the memory of a server elsewhere is not known"
    if not spec.admission:
        return "admission by memory is off"
    return "the memory that its batch needs is not known"
