"""The errors that a request ends with: the words of ``api.error_mapping``, and what the fleet shows at that moment."""

from collections.abc import Callable, Mapping

from backends.admission.slot_request import Isolation
from backends.diagnosis.suspects import MEMORY
from backends.domain.failure import CallFailure
from backends.domain.refusal import Refusal
from backends.fleet import Fleet
from gateway.api import error_mapping
from gateway.api.error_mapping import GaveUp
from gateway.api.errors import Code, GatewayError
from gateway.forward.request_state import ModelRules, RequestState


class ClientErrors:
    def __init__(
        self, fleet: Fleet, rules: Mapping[str, ModelRules], *, clock: Callable[[], float], show_output: bool
    ) -> None:
        self._fleet = fleet
        self._rules = rules
        self._clock = clock
        self._show_output = show_output

    def of_failure(
        self, state: RequestState, failure: CallFailure, *, suspect: bool, gave_up: GaveUp = GaveUp.NO_REPLICA
    ) -> GatewayError:
        return error_mapping.of_failure(
            failure,
            model=state.model,
            suspect=suspect,
            eta=error_mapping.soonest(self._fleet.snapshots(state.model)),
            show_output=self._show_output,
            has_content=state.responder.first_content_at is not None and state.client.headers_sent,
            gave_up=gave_up,
            prompt=str(state.best_size(state.progress.model or state.model)),
        )

    def of_refusal(self, state: RequestState, refusal: Refusal, model: str) -> GatewayError:
        if state.deadline is not None and self._clock() >= state.deadline - 0.01:
            total = self._rules[state.model].total
            message = f"no replica of model {model!r} took the request within {total:g} s (timeouts.total)"
            return GatewayError(Code.OVERLOADED, message, model=model)
        if state.progress.failures:  # no other replica could take it: the first failure says more
            last = state.progress.failures[-1]
            gave_up = GaveUp.TURN if state.progress.isolation is Isolation.APART else GaveUp.NO_REPLICA
            return self.of_failure(state, last, suspect=last.alone and last.verdict.cause in MEMORY, gave_up=gave_up)
        return error_mapping.of_refusal(
            refusal,
            self._fleet.snapshots(model),
            model=model,
            show_output=self._show_output,
            guarded=state.progress.guarded,
        )
