"""Which model answers: names and aliases, and the fallbacks behind a model whose replicas cannot. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Routes:
    """``names``: every name and alias a client may use, to the model's own name. ``fallbacks``: by model."""

    names: Mapping[str, str]
    fallbacks: Mapping[str, tuple[str, ...]]

    def resolve(self, name: str) -> str | None:
        """The model called ``name``. Without a name: the one called "default", or the only one there is."""
        if not name:
            models = set(self.names.values())
            return self.names.get("default") or (next(iter(models)) if len(models) == 1 else None)
        return self.names.get(name)

    def chain(self, model: str) -> tuple[str, ...]:
        """The model, then its fallbacks. A fallback's own fallbacks are not followed: the list says it all."""
        return (model, *self.fallbacks.get(model, ()))


@dataclass(frozen=True, slots=True)
class Prospect:
    """Of one model, without the replicas already tried. ``is_up_or_starting``: one is ready, or on its way to be."""

    ready: bool
    is_up_or_starting: bool


def choose(chain: Sequence[str], prospect: Callable[[str], Prospect]) -> str | None:
    """The first model of the chain with a replica that is up; else the first with one on its way; else None."""
    prospects = [(name, prospect(name)) for name in chain]
    up = (name for name, p in prospects if p.ready)
    coming = (name for name, p in prospects if p.is_up_or_starting)
    return next(up, None) or next(coming, None)
