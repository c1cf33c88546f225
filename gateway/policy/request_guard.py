"""Admission checks of a request (quarantine, context limit), and their updates when it ends. Per model.

    suspect at two failures                             -> refused
    longer than ``max_context`` or the learned ceiling  -> refused
    suspect at one failure, or as large as an expired
    ceiling                                             -> admitted, alone; if memory ran out, with all of it

Pure: time comes in as an argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from backends.admission.slot_request import Isolation
from backends.diagnosis.suspects import MEMORY, RequestProgress
from backends.domain.failure import CallFailure, Reason
from gateway.api.errors import GatewayError
from gateway.policy.answer_length import AnswerLengths
from gateway.policy.cached_prompts import CachedPrompts
from gateway.policy.context_limit import ContextLimit, Size
from gateway.policy.quarantine import Fingerprint, Quarantine


@dataclass(frozen=True, slots=True)
class Decision:
    """``refused``: the error, if the request is refused. ``isolation``: with which it is admitted."""

    refused: GatewayError | None = None
    isolation: Isolation = Isolation.SHARED


NOTHING_KNOWN = Decision()


@dataclass(frozen=True, slots=True)
class Suspect:
    """A request that was in flight at a failure. ``chars``: of its prompt."""

    fingerprint: Fingerprint
    chars: int
    progress: RequestProgress


class RequestGuard:
    """``max_context`` by model."""

    def __init__(self, max_context: Mapping[str, int | None]) -> None:
        self.quarantine = Quarantine()
        self.cached = CachedPrompts()
        self.lengths = AnswerLengths()
        self.contexts = {model: ContextLimit(model, most) for model, most in max_context.items()}

    def check(self, size: Size, fingerprint: Fingerprint, *, model: str, now: float) -> Decision:
        context = self.contexts[model]
        if (refused := context.refusal(size, now)) is not None:
            return Decision(refused)
        apart = context.on_probation(size)
        if not self.quarantine:
            return Decision(isolation=Isolation.APART) if apart else NOTHING_KNOWN
        body = fingerprint()
        if (refused := self.quarantine.refusal(body, now, largest=context.largest)) is not None:
            return Decision(refused)
        if apart or self.quarantine.suspected_of_shortage(body, now):
            return Decision(isolation=Isolation.APART)
        return Decision(isolation=Isolation.ALONE) if self.quarantine.suspected(body, now) else NOTHING_KNOWN

    def answered(self, fingerprint: Fingerprint, chars: int, tokens: int, *, by: str) -> None:
        """``by``: the model that answered, which may be a fallback. ``chars`` and ``tokens``: of the prompt, tokens as
        that model counted."""
        self.contexts[by].answered(chars, tokens)
        if self.quarantine:
            self.quarantine.clear(fingerprint())

    def failed(self, request: Suspect, failure: CallFailure, *, model: str, on: str, now: float) -> None:
        """``model``: the requested model; ``on``: the model whose backend failed. Counts only failures of which the
        request is a suspect, not those caused by an operator, the machine or the prompt cache."""
        if not failure.suspect or failure.verdict.reason is Reason.EMPTY_PROMPT:  # that lay in the prompt cache
            return
        progress = request.progress
        self.quarantine.note(request.fingerprint(), failure, model=model, tokens=progress.tokens, now=now)
        if failure.alone and failure.verdict.cause in MEMORY:
            self.contexts[on].ran_out(progress, request.chars, now)

    # -- for the operator ---------------------------------------------------------------------------------------------

    def known(self, now: float) -> dict[str, object]:
        ceilings = {model: context.ceiling(now) for model, context in self.contexts.items()}
        return {"requests": self.quarantine.entries(now), "ceilings": {m: c for m, c in ceilings.items() if c}}

    def forget(self, fingerprint: str = "") -> int:
        """Clear one fingerprint; without an argument all, and the learned ceilings. Returns the number of requests
        that were cleared."""
        if fingerprint:
            return self.quarantine.clear(_from_hex(fingerprint))
        cleared, self.quarantine = len(self.quarantine), Quarantine()
        for context in self.contexts.values():
            context.forget()
        return cleared


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""
