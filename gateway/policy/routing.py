"""Routing: names and aliases to models, and the fallbacks of a model whose replicas cannot answer. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Prospect:
    """State of one model, without the replicas already tried. ``ready``: a replica is ready; ``is_up_or_starting``: a
    replica is ready or starting."""

    ready: bool
    is_up_or_starting: bool


def choose(chain: Sequence[str], prospect: Callable[[str], Prospect]) -> str | None:
    """The first model of the chain with a ready replica; else the first with a starting one; else None."""
    prospects = [(name, prospect(name)) for name in chain]
    ready = (name for name, p in prospects if p.ready)
    starting = (name for name, p in prospects if p.is_up_or_starting)
    return next(ready, None) or next(starting, None)
