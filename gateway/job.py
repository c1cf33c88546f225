"""One request on its way: what is asked, of which model, and what has become of it so far."""

from collections.abc import Callable
from dataclasses import dataclass, field

from backends.admission import Lease
from backends.blame import Sight
from backends.failure import Failure
from gateway.client import Client, Header
from gateway.context import Size
from gateway.intake import Intake, RequestRules
from gateway.replies import Reply
from gateway.tokens import Counter


@dataclass(slots=True)
class Progress:
    """What became of one request so far; its log line is made of this."""

    tried: set[str] = field(default_factory=set)  # backends, also those that would only do the same
    tries: int = 0
    generations: int = 0  # tries that may have reached a backend
    backend: str = ""
    failures: list[Failure] = field(default_factory=list)
    alone: bool = False  # it may end a backend: nobody may be beside it
    on_budget: bool = False  # it holds a share of the retry budget


@dataclass(frozen=True, slots=True)
class Job:
    """One request to be answered. ``model`` is the config's name; ``deadline`` the event loop's time, or None."""

    client: Client
    intake: Intake
    model: str
    size: Size
    deadline: float | None
    reply: Reply
    progress: Progress = field(default_factory=Progress)

    def sight(self) -> Sight:
        """What it is doing at the backend, as far as its stream has told."""
        told = self.reply.progress
        counted = self.size.exact or told is None
        return Sight(
            tokens=self.size.tokens if counted or told is None else told[1],
            prefilling=told is not None,
            decoding=self.reply.answered,
        )


@dataclass(frozen=True, slots=True)
class ModelRules:
    """``request``: what the operator adds and takes away; ``vocab_size`` gives None where it cannot be read."""

    request: RequestRules
    vocab_size: Callable[[], int | None]
    counter: Counter
    is_mlx: bool
    total: float  # seconds for one request, all attempts; 0 = none
    max_context: int | None  # tokens
    max_tokens: int | None  # of an answer when the client does not say; None = not known


def facts(job: Job, lease: Lease, intake: Intake) -> list[Header]:
    """The headers that tell of this attempt. ``intake``: as it was sent."""
    out = [
        (b"x-gateway-model", lease.spec.model.encode("utf-8", "replace")),
        (b"x-gateway-backend", lease.spec.id.encode("utf-8", "replace")),
        (b"x-gateway-attempts", str(job.progress.tries).encode()),
    ]
    if intake.normalized:
        out.append((b"x-gateway-normalized", ", ".join(intake.normalized).encode()))
    if intake.warnings:
        out.append((b"x-gateway-warning", "; ".join(intake.warnings).encode("ascii", "replace")))
    return out
