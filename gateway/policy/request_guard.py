"""What is held against a request before it is let in, and what its end teaches: quarantine and context, per model.

    known to have ended two backends           -> refused
    too long for ``max_context``, or by
    what was learned from running out of memory -> refused
    once a suspect, or as large as what failed  -> let in, alone

Pure: time comes in as an argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from backends.diagnosis.suspects import MEMORY, RequestProgress
from backends.domain.failure import Failure
from gateway.api.errors import GatewayError
from gateway.policy.context_limit import ContextLimit, Size
from gateway.policy.quarantine import Quarantine, fingerprint
from gateway.request import ParsedRequest


@dataclass(frozen=True, slots=True)
class Decision:
    """``refused``: why the request is not let in. ``alone``: it is, with nobody beside it."""

    refused: GatewayError | None = None
    alone: bool = False


NOTHING_KNOWN = Decision()


class RequestGuard:
    """``max_context`` by model."""

    def __init__(self, max_context: Mapping[str, int | None]) -> None:
        self.quarantine = Quarantine()
        self.contexts = {model: ContextLimit(model, most) for model, most in max_context.items()}

    def standing(self, parsed: ParsedRequest, size: Size, *, model: str, now: float) -> Decision:
        context = self.contexts[model]
        if (refused := context.refusal(size, now)) is not None:
            return Decision(refused)
        alone = context.on_probation(size)
        if not self.quarantine:
            return Decision(alone=True) if alone else NOTHING_KNOWN
        body = fingerprint(model, parsed.params)
        if (refused := self.quarantine.refusal(body, now, largest=context.largest)) is not None:
            return Decision(refused)
        return Decision(alone=alone or self.quarantine.suspected(body, now))

    def answered(self, parsed: ParsedRequest, tokens: int, *, model: str, by: str) -> None:
        """``by``: the model that answered, a fallback perhaps; ``tokens``: of the prompt, as it counted."""
        self.contexts[by].answered(parsed.prompt_chars, tokens)
        if self.quarantine:
            self.quarantine.clear(fingerprint(model, parsed.params))

    def failed(
        self, parsed: ParsedRequest, failure: Failure, progress_now: RequestProgress, *, model: str, on: str, now: float
    ) -> None:
        """``on``: the model whose backend it was. Only what speaks against the request counts; what a person or the
        machine did does not."""
        if not failure.suspect:
            return
        body = fingerprint(model, parsed.params)
        self.quarantine.note(body, failure, model=model, tokens=progress_now.tokens, now=now)
        if failure.alone and failure.cause in MEMORY:
            self.contexts[on].ran_out(progress_now, parsed.prompt_chars, now)

    # -- for the operator ---------------------------------------------------------------------------------------------

    def known(self, now: float) -> dict[str, object]:
        ceilings = {model: context.ceiling(now) for model, context in self.contexts.items()}
        return {"requests": self.quarantine.entries(now), "ceilings": {m: c for m, c in ceilings.items() if c}}

    def forget(self, fingerprint: str = "") -> int:
        """This one; without an argument everything, and what was learned of sizes with it. Returns how many requests
        were let go."""
        if fingerprint:
            return self.quarantine.clear(_from_hex(fingerprint))
        gone, self.quarantine = len(self.quarantine), Quarantine()
        for context in self.contexts.values():
            context.forget()
        return gone


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""
