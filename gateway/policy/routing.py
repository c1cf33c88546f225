"""Routing: names and aliases to models, and the fallbacks of a model whose replicas cannot answer. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True, slots=True)
class Routes:
    """``names``: name or alias → name of the model. ``fallbacks``: by model."""

    names: Mapping[str, str]
    fallbacks: Mapping[str, tuple[str, ...]]

    def resolve(self, name: str) -> str | None:
        """The model with that name or alias. For an empty name: the one called "default", or the only model."""
        if not name:
            models = set(self.names.values())
            return self.names.get("default") or (next(iter(models)) if len(models) == 1 else None)
        return self.names.get(name)

    def chain(self, model: str) -> tuple[str, ...]:
        """The model, then its fallbacks. Fallbacks of a fallback are not followed."""
        return (model, *self.fallbacks.get(model, ()))


class Prospect(IntEnum):
    """What a model can do for a request, without the replicas that it was tried on; the least is the best."""

    READY = 0  # a replica is ready, or is loaded for the request
    STARTING = 1  # a replica is starting
    RETURNING = 2  # a replica restarts, and will be back within the request's patience
    NONE = 3


def choose(chain: Sequence[str], prospect: Callable[[str], Prospect]) -> str | None:
    """The first model of the chain with the best prospect; None if none has any. Each is asked once."""
    prospects = {name: prospect(name) for name in chain}
    best = min(chain, key=lambda name: prospects[name], default=None)
    return None if best is None or prospects[best] is Prospect.NONE else best
