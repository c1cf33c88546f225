"""Which replica answers a request: a model of its chain, and a lease on one of its replicas, for which it may wait.

While a request is queued its model may go down as a whole, or a fallback may come up: then the chain is looked at
again. A replica that restarts is waited for as long as the request's patience lasts (``policy.patience``).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from backends.admission.lease import Lease
from backends.admission.pool import Pool
from backends.admission.slot_request import Isolation, SlotRequest
from backends.domain.place import Place
from backends.domain.priority import Priority
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Seat
from backends.domain.work import Work
from backends.fleet import Fleet
from backends.mlx_server import is_batchable
from gateway.api import waits
from gateway.forward.request_state import ModelRules, RequestState, size_of, work_of
from gateway.policy import routing
from gateway.policy.affinity import Affinity, preferred
from gateway.policy.cached_prompts import reads_cached_prompts
from gateway.policy.patience import patience
from gateway.policy.request_guard import RequestGuard
from gateway.policy.routing import Prospect
from gateway.policy.slicing import Slicing
from gateway.request import sent


@dataclass(frozen=True, slots=True)
class Denied:
    """No replica of ``model``, or of any model of the chain, was there to take the request."""

    refusal: Refusal
    model: str


class Leasing:
    """``affinity``: which replica has the beginning of a conversation cached."""

    def __init__(
        self,
        fleet: Fleet,
        routes: routing.Routes,
        rules: Mapping[str, ModelRules],
        guard: RequestGuard,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._routes = routes
        self._rules = rules
        self._guard = guard
        self._clock = clock
        self.affinity = Affinity()

    async def acquire(self, state: RequestState) -> Lease | Denied:
        """A slot on a replica not yet tried, of the model or of a fallback."""
        chain = self._routes.chain(state.model)
        asked: set[str] = set()  # models that this request has had loaded, if they were unloaded: once is enough
        refused: set[str] = set()  # models that refused it since it last waited: nothing has changed there
        while model := routing.choose(
            chain, lambda name: Prospect.NONE if name in refused else self._prospect(state, name, asked)
        ):
            if model not in state.sizes:  # a fallback: once its tokens are counted, it may be out of the question
                state.sizes[model] = await size_of(state.parsed, self._guard.contexts[model], self._rules[model])
                continue
            asked.add(model)
            waited = state.progress.waited
            granted = await self._of_model(state, model)
            if isinstance(granted, Lease):
                return granted
            if granted is None:
                continue
            if granted.why is not Why.UNAVAILABLE:
                return Denied(granted, model)
            if state.progress.waited > waited:
                refused.clear()
            refused.add(model)
        for model in chain:
            self._fleet.pools[model].look_again()
        return Denied(Refusal(Why.UNAVAILABLE, patience=self._patience(state, state.model)), state.model)

    async def again(self, state: RequestState, *, idle: bool) -> Lease | Refusal:
        """For an answer in its middle: a replica of the same model, that is ready or comes back. ``idle``: no other
        request may be in flight there while the answer is generated again; others are not kept out for that."""
        progress, model = state.progress, state.progress.model
        pool = self._fleet.pools[model]
        progress.guarded = False
        request = SlotRequest(
            exclude=progress.excluded.with_seats(self._risky(state, pool)),
            within=self._patience_after_its_turn(state, model),
            isolation=max(progress.isolation, Isolation.ALONE if idle else Isolation.SHARED),
            reserves=bool(progress.isolation),
            unbatchable=self.unbatchable(state, model),
            work=self._work(state, model),
            goes_on=True,
            priority=self._priority(state, model),
        )
        return await pool.acquire(request, waiting=partial(self._waiting, state, model))

    async def _of_model(self, state: RequestState, model: str) -> Lease | Refusal | None:
        """None: it was sent to a replica that has got such a prompt while this one was queued; each can do so once."""
        pool, progress = self._fleet.pools[model], state.progress
        risky = self._risky(state, pool)
        careful = progress.excluded.with_seats(risky) if risky else progress.excluded
        elsewhere = not progress.emptied and pool.ready(careful)
        progress.guarded = progress.emptied or (bool(risky) and not elsewhere)
        slicing, (held, tokens) = progress.slicing, self.affinity.known(state.path, pool.ids)
        progress.held = held
        progress.likely[model] = tokens or self._guard.contexts[model].usual(state.parsed.prompt_chars)
        work = self._work(state, model)
        prefer = preferred(held, work.prompt_tokens) or self._hinted(state, pool)
        whole = slicing is None or len(pool.backends) > 1  # it may not be read in slices there
        request = SlotRequest(
            exclude=careful if elsewhere else progress.excluded,
            within=self._patience(state, model),
            # Most that are guarded only look alike: no reason to hold up all.
            isolation=max(progress.isolation, Isolation.ALONE if progress.emptied else Isolation.SHARED),
            unbatchable=self.unbatchable(state, model),
            prefer=prefer,
            held=held,
            work=work if slicing is None or whole else slice_work(slicing),
            priority=self._priority(state, model),
            long=slicing is not None,
            goes_on=bool(progress.failures or (slicing is not None and slicing.count)),
        )
        granted = await pool.acquire(request, waiting=partial(self._waiting, state, model))
        if isinstance(granted, Refusal):
            return granted
        seat = granted.seat
        if progress.guarded or not self._guard.cached.may_hold(seat, state.prompt) or self._reads_cached(seat):
            return granted
        granted.release()
        return None

    async def turn(self, state: RequestState, slicing: Slicing) -> Lease | Denied:
        """For the next slice of a prompt, or for what is left of it."""
        model, pool = state.model, self._fleet.pools[state.model]
        request = SlotRequest(
            exclude=state.progress.excluded,
            within=self._patience_after_its_turn(state, model),
            prefer=slicing.seat,
            held={} if slicing.seat is None else {slicing.seat: slicing.read},
            work=slice_work(slicing) if slicing.may_go_on else self._work(state, model),
            priority=self._priority(state, model),
            long=True,
            goes_on=True,
        )
        granted = await pool.acquire(request)
        return granted if isinstance(granted, Lease) else Denied(granted, model)

    @contextmanager
    def _waiting(self, state: RequestState, model: str, place: Callable[[], Place]) -> Iterator[None]:
        """What it waits counts against its patience. The client of a stream is told meanwhile what for, and where it
        stands in the queue: ``place``."""
        began, progress = self._clock(), state.progress
        apart = progress.isolation is Isolation.APART
        last = progress.failures[-1] if apart and progress.failures else None
        crowd = last.crowd if last is not None else 0

        def told() -> str:
            waited = progress.waited + self._clock() - began
            return waits.told(self._fleet.snapshots(model), place(), model=model, waited=waited, crowd=crowd)

        progress.waited_for = waits.phase(self._fleet.snapshots(model), place())
        stop = state.tell_while_waiting(told)
        try:
            yield
        finally:
            stop()
            progress.waited += self._clock() - began

    def _prospect(self, state: RequestState, model: str, asked: set[str]) -> Prospect:
        """A model that is loaded on demand counts as ready: its fallbacks are for failures. A fallback is not loaded
        where the model itself is a moment away."""
        if model != state.model and self._too_long_for(model, state):
            return Prospect.NONE
        pool, exclude = self._fleet.pools[model], state.progress.excluded
        if pool.ready(exclude):
            return Prospect.READY
        on_call = pool.loading_on_demand(exclude) or (model not in asked and pool.unloaded(exclude))
        if on_call and model == state.model:
            return Prospect.READY
        until = self._clock() + self._patience(state, model)
        if not on_call and not pool.recovers(exclude, until=until, needs=self.needs(state, model)):
            return Prospect.NONE
        return Prospect.STARTING if pool.may_answer(exclude) else Prospect.RETURNING

    def _too_long_for(self, model: str, state: RequestState) -> bool:
        """For a fallback, whose tokens are others."""
        size = state.sizes.get(model)
        return size is not None and self._guard.contexts[model].refusal(size, self._clock()) is not None

    def _patience(self, state: RequestState, model: str) -> float:
        return patience(
            self._fleet.pools[model].queue_timeout,
            state.progress.waited,
            deadline=state.deadline,
            client_deadline=state.client_deadline,
            now=self._clock(),
        )

    def _patience_after_its_turn(self, state: RequestState, model: str) -> float:
        """Of a request that was admitted before, and goes on: what it waited for that, and its client's own patience,
        do not count any more; no wait is longer than that of any other request."""
        timeout = self._fleet.pools[model].queue_timeout
        return patience(timeout, 0.0, deadline=state.deadline, client_deadline=None, now=self._clock())

    def needs(self, state: RequestState, model: str) -> float:
        """Seconds that a replica which has just started takes to read the prompt: its prompt cache is empty."""
        return self._fleet.pools[model].reading(state.sizes.get(model, state.size).tokens)

    def cached(self, state: RequestState) -> int:
        """Tokens of the beginning of its prompt that an instance has in its prompt cache, as far as is known."""
        known = self.affinity.known(state.path, self._fleet.pools[state.model].ids)
        return max(known.held.values(), default=0)

    def _hinted(self, state: RequestState, pool: Pool) -> Seat | None:
        """The replica that last answered its session, if none is less busy: nothing of the prompt is known to be cached
        there."""
        seat = self.affinity.hinted(state.path)
        if seat is None:
            return None
        own = next((b for b in pool.backends if seat == (b.id, b.generation)), None)
        return seat if own is not None and own.inflight <= min(b.inflight for b in pool.backends) else None

    def _work(self, state: RequestState, model: str) -> Work:
        return work_of(state, state.parsed, model, rules=self._rules[model], lengths=self._guard.lengths)

    def _priority(self, state: RequestState, model: str) -> Priority:
        """A fallback may be of a lower class."""
        return max(state.priority, self._rules[model].priority)

    def unbatchable(self, state: RequestState, model: str) -> bool:
        """mlx_lm.server would not answer others beside it."""
        return state.progress.guarded or not is_batchable(sent(state.parsed, self._rules[model].request))

    def _risky(self, state: RequestState, pool: Pool) -> frozenset[Seat]:
        """The instances that may hold the whole prompt in their prompt cache, and would end by it."""
        holding = self._guard.cached.risky(pool.seats, state.prompt)
        return holding and frozenset(seat for seat in holding if not self._reads_cached(seat))

    def _reads_cached(self, seat: Seat) -> bool:
        return reads_cached_prompts(self._fleet.backends[seat.backend].report)


def slice_work(slicing: Slicing) -> Work:
    return Work(slicing.target, 1)
