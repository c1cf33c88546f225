"""Advice on standby: what a crash of a model's process costs, and when one replica is better than several on one Mac.

Replicas of one machine hold the weights once each, and share its GPU and its memory: what ends one often ends all. A
second one saves the pause of a restart. Pure.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from backends.memory import units

DEAR = 0.1  # of the memory: weights of the replicas beyond the first that deserve a word


@dataclass(frozen=True, slots=True)
class Standby:
    """``weights``: bytes of one replica, 0 = not known. ``memory``: bytes, for all models. Seconds: ``backoff`` before
    a restart, ``load`` from the launch to the first token (None = never measured), ``patience`` of queued requests."""

    model: str
    replicas: int
    weights: int
    memory: int
    backoff: float
    load: float | None
    patience: float

    @property
    def pause(self) -> float | None:
        """Seconds without a replica if there is one only, and it crashes."""
        return None if self.load is None else self.backoff + self.load

    @property
    def is_dear(self) -> bool:
        return (self.replicas - 1) * self.weights > DEAR * self.memory


def advice(s: Standby) -> Iterator[str]:
    """One line at most."""
    if s.replicas == 1 and s.pause is not None:
        yield f"{s.model}: a crash of its one replica is a pause of about {_shown(s.pause)}{_met(s)}"
    elif s.is_dear:
        held, spare = s.replicas * s.weights, (s.replicas - 1) * s.weights
        yield (
            f"{s.model}: {s.replicas} replicas hold the weights {s.replicas} times ({_size(s.weights)} each, "
            f"{_size(held)} of {_size(s.memory)}), and a GPU reset or a lack of memory ends them together. "
            f"{_one(s)}: replicas: 1 would leave {_size(spare)} for long prompts and other models"
        )


def _one(s: Standby) -> str:
    if s.pause is None:
        return "How long one replica takes to restart is not known before its first start; requests wait for it"
    return f"One replica restarts in about {_shown(s.pause)}{_met(s)}"


def _met(s: Standby) -> str:
    """What requests meet meanwhile."""
    if s.pause is not None and s.pause > s.patience:
        return (
            f", longer than requests wait ({_shown(s.patience)}, the least of queue_timeout and timeouts.total): they "
            f"are refused meanwhile, unless these are raised"
        )
    return "; requests wait for it, then their prompts are read again (the prompt cache is lost)"


def _shown(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 120 else f"{round(seconds / 60)} min"


def _size(count: int) -> str:
    return units.memory(count, 2)
