"""One request on its way: what is asked, of which model, and what has become of it so far."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from backends.admission.lease import Lease
from backends.diagnosis.suspects import RequestProgress
from backends.domain.failure import CallFailure
from gateway.forward.responders import Responder
from gateway.forward.sink import Header, Sink
from gateway.forward.token_counter import TokenCounter
from gateway.policy.context_limit import Size
from gateway.policy.quarantine import Fingerprint
from gateway.request import ParsedRequest, RequestRules
from gateway.stream.resume import Outcome


@dataclass(slots=True)
class Progress:
    """What became of one request so far; its log line is made of this."""

    tried: set[str] = field(default_factory=set)  # backends, also those that would only do the same
    tries: int = 0
    generations: int = 0  # tries that may have reached a backend
    backend: str = ""
    model: str = ""  # whose backend that is
    resumed: Outcome | None = None
    failures: list[CallFailure] = field(default_factory=list)
    alone: bool = False  # it may end a backend: no other request may be in flight beside it
    on_budget: bool = False  # it holds a share of the retry budget


@dataclass(frozen=True, slots=True)
class RequestState:
    """One request to be answered. ``model`` is the config's name; ``deadline`` the event loop's time, or None."""

    client: Sink
    parsed: ParsedRequest
    model: str
    size: Size
    deadline: float | None
    responder: Responder
    fingerprint: Fingerprint
    keys: tuple[int, ...] = ()  # what its conversation may be known by
    progress: Progress = field(default_factory=Progress)

    def progress_now(self) -> RequestProgress:
        """What it is doing at the backend, as far as its stream has told."""
        told = self.responder.progress
        counted = self.size.exact or told is None
        return RequestProgress(
            tokens=self.size.tokens if counted or told is None else told[1],
            prefilling=told is not None,
            decoding=self.responder.answered,
        )


@dataclass(slots=True)
class Cached:
    """Tokens of the prompts of one model, and how many of them its prompt caches held."""

    prompt_tokens: int = 0
    cached_tokens: int = 0

    def count(self, usage: Mapping[str, object]) -> None:
        tokens = usage.get("prompt_tokens")
        self.prompt_tokens += tokens if isinstance(tokens, int) else 0
        self.cached_tokens += cached_tokens(usage)


def story(states: Sequence[RequestState], began: float) -> dict[str, object]:
    """For the log: of one request, which is several jobs where it asked for several answers. ``began``: the event
    loop's time."""
    first = states[0]
    spoken = [at for state in states if (at := state.responder.first_content_at) is not None]
    first_content_at = min(spoken, default=None)
    failures = [failure for state in states for failure in state.progress.failures]
    usages = [usage for state in states if (usage := state.responder.usage) is not None]
    fields: dict[str, object] = {
        "model": first.model,
        "backend": ",".join(sorted({state.progress.backend for state in states if state.progress.backend})) or None,
        "attempts": sum(state.progress.tries for state in states),
        "stream": first.parsed.stream,
        "first_ms": None if first_content_at is None else ms(first_content_at - began),
    }
    if resumed := [state.progress.resumed.value for state in states if state.progress.resumed is not None]:
        fields["resumed"] = ",".join(resumed)
    if len(states) > 1:
        fields["choices"] = len(states)
    for key, name in (("prompt_tokens", "prompt_tokens"), ("tokens", "completion_tokens")):
        if usages:
            fields[key] = sum(usage.get(name) or 0 for usage in usages)
    if cached := sum(cached_tokens(usage) for usage in usages):
        fields["cached"] = cached
    if failures:
        fields["failed"] = ",".join(f"{f.verdict.backend}={f.verdict.cause.value}" for f in failures)
    return fields


def cached_tokens(usage: Mapping[str, object]) -> int:
    """Of the prompt, as the backend counted; 0 where it does not say."""
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if isinstance(cached, int) else 0


def ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


@dataclass(frozen=True, slots=True)
class ModelRules:
    """``request``: what the operator adds and takes away; ``vocab_size`` gives None where it cannot be read."""

    request: RequestRules
    allow: frozenset[str]  # what clients may do that is refused otherwise
    vocab_size: Callable[[], Awaitable[int | None]]
    counter: TokenCounter
    is_mlx: bool
    temperature: float  # where a request has none
    total: float  # seconds for one request, all attempts; 0 = none
    max_context: int | None  # tokens
    max_tokens: int | None  # of an answer when the client does not say; None = not known


def facts(state: RequestState, lease: Lease, parsed: ParsedRequest) -> list[Header]:
    """The headers that tell of this attempt. ``parsed``: as it was sent."""
    out = [
        (b"x-gateway-model", lease.spec.model.encode("utf-8", "replace")),
        (b"x-gateway-backend", lease.spec.id.encode("utf-8", "replace")),
        (b"x-gateway-attempts", str(state.progress.tries).encode()),
    ]
    if parsed.normalized:
        out.append((b"x-gateway-normalized", ", ".join(parsed.normalized).encode()))
    if parsed.warnings:
        out.append((b"x-gateway-warning", "; ".join(parsed.warnings).encode("ascii", "replace")))
    return out
