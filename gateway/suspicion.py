"""What is held against a request before it is let in, and what its end teaches: quarantine and context, per model.

    known to have ended two backends           -> refused
    too long for ``max_context``, or by
    what was learned from running out of memory -> refused
    once a suspect, or as large as what failed  -> let in, alone

Pure: time comes in as an argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from backends.blame import MEMORY, Sight
from backends.failure import Failure
from gateway.context import Context, Size
from gateway.errors import GatewayError
from gateway.intake import Intake
from gateway.quarantine import Quarantine, fingerprint


@dataclass(frozen=True, slots=True)
class Standing:
    """``refused``: why the request is not let in. ``alone``: it is, with nobody beside it."""

    refused: GatewayError | None = None
    alone: bool = False


NOTHING_KNOWN = Standing()


class Suspicion:
    """``max_context`` by model."""

    def __init__(self, max_context: Mapping[str, int | None]) -> None:
        self.quarantine = Quarantine()
        self.contexts = {model: Context(model, most) for model, most in max_context.items()}

    def standing(self, intake: Intake, size: Size, *, model: str, now: float) -> Standing:
        context = self.contexts[model]
        if (refused := context.refusal(size, now)) is not None:
            return Standing(refused)
        alone = context.on_probation(size)
        if not self.quarantine:
            return Standing(alone=True) if alone else NOTHING_KNOWN
        body = fingerprint(model, intake.params)
        if (refused := self.quarantine.refusal(body, now, largest=context.largest)) is not None:
            return Standing(refused)
        return Standing(alone=alone or self.quarantine.suspected(body, now))

    def answered(self, intake: Intake, tokens: int, *, model: str, by: str) -> None:
        """``by``: the model that answered, a fallback perhaps; ``tokens``: of the prompt, as it counted."""
        self.contexts[by].answered(intake.prompt_chars, tokens)
        if self.quarantine:
            self.quarantine.clear(fingerprint(model, intake.params))

    def failed(self, intake: Intake, failure: Failure, sight: Sight, *, model: str, on: str, now: float) -> None:
        """``on``: the model whose backend it was. Only what speaks against the request counts; what a person or the
        machine did does not."""
        if not failure.suspect:
            return
        body = fingerprint(model, intake.params)
        self.quarantine.note(body, failure, model=model, tokens=sight.tokens, now=now)
        if failure.alone and failure.cause in MEMORY:
            self.contexts[on].ran_out(sight, intake.prompt_chars, now)

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
