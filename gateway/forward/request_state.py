"""The state of one request: its parsed body, its model, its responder, and its progress so far."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from backends.admission.excluded import NOTHING, Excluded
from backends.admission.lease import Lease
from backends.admission.slot_request import Isolation
from backends.diagnosis.suspects import RequestProgress
from backends.domain.failure import CallFailure
from backends.domain.priority import Priority
from backends.domain.snapshot import Seat
from backends.domain.work import Work
from gateway.forward.responders import Responder, asks_for_tools
from gateway.forward.sink import Header, Sink
from gateway.forward.token_counter import TokenCounter
from gateway.forward.usage import NOTHING as NO_USAGE
from gateway.forward.usage import Usage, usage_of
from gateway.policy.affinity import NO_PATH, Path
from gateway.policy.answer_length import AnswerLengths
from gateway.policy.cached_prompts import NO_PROMPT, Prompt, Trace
from gateway.policy.context_limit import ContextLimit, Size, most_tokens
from gateway.policy.quarantine import Fingerprint
from gateway.policy.slicing import Slicing
from gateway.request import ParsedRequest, RequestRules, sent
from gateway.stream.resume import Outcome

ASSUMED_TOKENS = 8192  # of an answer whose limit neither the request nor the config says: for judging its silence


@dataclass(slots=True)
class Progress:
    """Attempts and failures of one request so far; source of its log line."""

    excluded: Excluded = NOTHING  # the instances that it was tried on, and what would fail in the same way
    tries: int = 0
    generations: int = 0  # tries that may have reached a backend
    backend: str = ""
    model: str = ""  # of ``backend``
    resumed: Outcome | None = None
    failures: list[CallFailure] = field(default_factory=list)
    isolation: Isolation = Isolation.SHARED  # it may kill a backend, or need all of the memory
    outgrown: bool = False  # it was stopped so that memory lasts: its answer counts as all that it may be from now on
    on_budget: bool = False  # it holds a grant of the retry budget
    emptied: bool = False  # its prompt, cached whole, may have ended a generation thread: it may be so elsewhere too
    trace: Trace | None = None  # of this attempt, if it is at a completion
    guarded: bool = False  # this attempt is on a replica that may have its prompt cached whole
    reported: dict[str, int] = field(default_factory=dict)  # tokens of its prompt, as a backend has reported, by model
    held: Mapping[Seat, int] = field(default_factory=dict)  # tokens of its prompt that each instance has cached
    likely: dict[str, int] = field(default_factory=dict)  # tokens that its prompt probably has, by model
    waited: float = 0.0  # seconds in queues so far, for loads and restarts too
    waited_for: str = ""  # what for, last
    slicing: Slicing | None = None  # its prompt is read in slices
    usage: Usage = NO_USAGE  # of its whole answer


@dataclass(frozen=True, slots=True)
class RequestState:
    """One request to be answered. ``model``: name in the config; ``deadline``, and ``client_deadline``, when the client
    gives up: event loop's time, or None."""

    client: Sink
    parsed: ParsedRequest
    model: str
    size: Size
    deadline: float | None
    responder: Responder
    fingerprint: Fingerprint
    path: Path = NO_PATH  # of its prompt, see ``policy.affinity``
    prompt: Prompt = NO_PROMPT
    progress: Progress = field(default_factory=Progress)
    client_deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE  # as its client asked, or as the model has it
    is_copy: bool = False  # another request has the same prompt, and goes first
    source: int = 0  # its kind of requests, whose answers tell how long this one is likely to be
    sizes: dict[str, Size] = field(default_factory=dict)  # of the prompt, by model: fallbacks count other tokens

    def __post_init__(self) -> None:
        self.sizes[self.model] = self.size

    def progress_now(self) -> RequestProgress:
        """Its progress at the backend, as far as its stream has reported."""
        size, reported = self.best_size(self.progress.model or self.model), self.responder.progress
        return RequestProgress(
            tokens=size.tokens,
            prefilling=reported is not None,
            decoding=self.responder.answered,
            counted=size.certain,
            prompt_read=reported is not None and reported[0] >= reported[1] > 0,
            read=0 if reported is None else size.tokens - (reported[1] - reported[0]),
        )

    def best_size(self, model: str) -> Size:
        """The best that is known of the size of its prompt for ``model``. What a backend has reported, in this attempt
        or an earlier one, is without the part that was in its prompt cache."""
        size = self.sizes.get(model, self.size)
        now = self.responder.progress if model == self.progress.model else None
        reported = max(0 if now is None else now[1], self.progress.reported.get(model, 0))
        if not reported or (size.certain and size.tokens >= reported):
            return size
        return Size(reported, size.chars, exact=True)

    def tell_while_waiting(self, told: Callable[[], str]) -> Callable[[], None]:
        """The client of a stream is sent what ``told`` gives, now and then; that of an answer in one piece cannot be
        told anything before it. Returns the function that ends that."""
        return self.client.waits(told) if self.parsed.stream else _nothing

    def keep_reported(self) -> None:
        """The attempt has failed: the next one begins to report anew, and may not come as far."""
        reported, model = self.responder.progress, self.progress.model
        if reported is not None:
            self.progress.reported[model] = max(reported[1], self.progress.reported.get(model, 0))


def _nothing() -> None:
    pass


def story(states: Sequence[RequestState], began: float) -> dict[str, object]:
    """Log fields of one request, which has several states if it asked for several answers. ``began``: event loop's
    time."""
    first = states[0]
    times = [at for state in states if (at := state.responder.first_content_at) is not None]
    first_content_at = min(times, default=None)
    failures = [failure for state in states for failure in state.progress.failures]
    usages = [usage_of(usage) for state in states if (usage := state.responder.usage) is not None]
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
    if usages:
        fields["prompt_tokens"] = sum(usage.prompt for usage in usages)
        fields["tokens"] = sum(usage.answer for usage in usages)
    if cached := sum(usage.cached for usage in usages):
        fields["cached"] = cached
    if slices := sum(state.progress.slicing.count for state in states if state.progress.slicing is not None):
        fields["slices"] = slices
    if failures:
        fields["failed"] = ",".join(f"{f.verdict.backend}={f.verdict.cause.value}" for f in failures)
    return fields


def ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


@dataclass(frozen=True, slots=True)
class ModelRules:
    """``request``: the operator's defaults and overrides; ``vocab_size`` and ``trained_context`` (tokens) return None
    if they cannot be read."""

    request: RequestRules
    allow: frozenset[str]  # features that are refused or ignored unless listed
    vocab_size: Callable[[], Awaitable[int | None]]
    trained_context: Callable[[], Awaitable[int | None]]
    counter: TokenCounter
    priority: Priority  # of its requests; a client may lower it
    temperature: float  # of the server, for a request without one
    total: float  # seconds for one request, all attempts; 0 = none
    max_context: int | None  # tokens
    max_tokens: int | None  # of an answer, for a request that sets none; None = not known
    trims: Callable[[], Awaitable[int | None]]  # its prompt cache can be cut back, as far as its config.json tells


def facts(state: RequestState, lease: Lease, parsed: ParsedRequest, *, begun: bool = True) -> list[Header]:
    """The ``x-gateway-*`` headers of this attempt. ``parsed``: the request as it was sent upstream; ``begun``: the
    attempt is counted already."""
    out = [
        (b"x-gateway-model", lease.spec.model.encode("utf-8", "replace")),
        (b"x-gateway-backend", lease.spec.id.encode("utf-8", "replace")),
        (b"x-gateway-attempts", str(state.progress.tries + (not begun)).encode()),
    ]
    if state.progress.waited_for:
        waited = f"{state.progress.waited:.1f} s: {state.progress.waited_for}"
        out.append((b"x-gateway-queue", waited.encode()))
    if parsed.normalized:
        out.append((b"x-gateway-normalized", ", ".join(parsed.normalized).encode()))
    if parsed.warnings:
        out.append((b"x-gateway-warning", "; ".join(parsed.warnings).encode("ascii", "replace")))
    return out


def work_of(
    state: RequestState, parsed: ParsedRequest, model: str, *, rules: ModelRules, lengths: AnswerLengths
) -> Work:
    """What ``parsed``, the request as it would be sent, asks of a replica of ``model``."""
    asked = sent(parsed, rules.request)("max_tokens")
    known = asked if isinstance(asked, int) else rules.max_tokens
    tokens = ASSUMED_TOKENS if known is None else known
    size = state.best_size(model)
    return Work(
        size.tokens if size.certain else max(size.tokens, state.progress.likely.get(model, 0)),
        tokens,
        tokens if state.progress.outgrown else lengths.likely(model, state.source, tokens),
        one_piece=not state.responder.upstream_streams,
        tools=asks_for_tools(parsed),
    )


async def size_of(parsed: ParsedRequest, context: ContextLimit, rules: ModelRules) -> Size:
    """The size of a prompt for one model: estimated where it surely fits, else counted where that can be done."""
    context.trained = await rules.trained_context() or None  # 0: its files do not say
    answer = sent(parsed, rules.request)("max_tokens") or rules.max_tokens or 0
    most = most_tokens(parsed.prompt_chars, parsed.body_size, len(parsed.params.get("messages", ())))
    if context.in_question(most, answer):
        count = await rules.counter.count(parsed.kind, parsed.params, context.enough)
        if count is not None:
            return Size(count.tokens, parsed.prompt_chars, exact=count.exact, at_least=count.at_least)
    return context.estimate(parsed.prompt_chars)
