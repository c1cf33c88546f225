"""A long prompt is sent in slices: what goes out, over which lease, and how it ends."""

import asyncio
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from backends.admission.reading_rate import ReadingRate
from backends.admission.slot_request import Isolation
from backends.domain.failure import Aftermath, Blame, CallFailure, Cause, Failure
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Seat
from backends.upstream.exchange import ExchangeError, Fault, Head, Request
from gateway.api.kinds import Kind
from gateway.forward.leasing import Denied
from gateway.forward.request_state import Progress
from gateway.forward.slices import Slices
from gateway.forward.token_counter import Cut, Script
from gateway.forward.usage import Usage
from gateway.policy.cached_prompts import MARGIN, Prompt, Text
from gateway.policy.request_guard import RequestGuard
from gateway.policy.slicing import FURTHER, LOST, Ability, Slicing

RULES = SimpleNamespace(defaults={}, force={"temperature": 1}, drop=())
PROMPT = "".join(f"{i:07} " for i in range(5000))  # 8 characters, and as many tokens as that
HERE, THERE = Seat("m:0", 1), Seat("m:1", 1)
NEXT = 77  # the token after each cut
CRASH = CallFailure(Failure(Cause.NATIVE_CRASH, Aftermath.EXITED, "gone", Blame.BACKEND, "m:0"), suspect=True)
BAD = CallFailure(Failure(Cause.NONE, Aftermath.ALIVE, "no such field", Blame.REQUEST, "m:0"))


class Server:
    """mlx_lm.server, as far as its prompt cache goes: by characters. ``ends``: how the slice of that number ends.
    ``losses``: numbers of slices before which its prompt cache is emptied."""

    def __init__(self, ends: dict[int, Any] | None = None, *, able: bool = True, losses: Collection[int] = ()) -> None:
        self.ends = ends or {}
        self._losses = losses
        self.bodies: list[dict[str, Any]] = []
        self.cached = 0
        self.at_work = asyncio.Event()  # on a slice that never ends
        self._able = able

    def take(self, request: Request) -> Any:
        """Pieces of its answer, an error or a status; None = nothing ever comes."""
        body = json.loads(request.body)
        self.bodies.append(body)
        if (number := len(self.bodies)) in self.ends:
            if self.ends[number] is None:
                self.at_work.set()
            return self.ends[number]
        if number in self._losses:
            self.cached = 0
        size = len(body["prompt"])
        usage = {"prompt_tokens": size, "completion_tokens": 1, "total_tokens": size + 1}
        usage |= {"prompt_tokens_details": {"cached_tokens": self.cached}}  # type: ignore[dict-item]
        self.cached = size if self._able else 0
        return [
            f": keepalive {size}/{size}\n\n".encode(),
            LAST_TOKEN,
            _event(choices=[], usage=usage) + b"data: [DONE]\n\n",
        ]

    @property
    def prompts(self) -> list[str]:
        return [body["prompt"] for body in self.bodies]

    @property
    def forced(self) -> list[int]:
        return [int(token) for body in self.bodies for token in body["logit_bias"]]


def _event(**rest: Any) -> bytes:
    return b"data: " + json.dumps({"id": "x", "object": "text_completion", **rest}).encode() + b"\n\n"


LAST_TOKEN = _event(choices=[{"index": 0, "finish_reason": "length", "text": ""}])


class Exchange:
    def __init__(self, answer: list[bytes | Exception] | Exception | int) -> None:
        self._answer = answer
        self.last_heard = 0.0

    async def start(self) -> Head:
        if isinstance(self._answer, Exception):
            raise self._answer
        return Head(self._answer if isinstance(self._answer, int) else 200, ())

    async def read(self, _offer: object = None) -> bytes:
        if not isinstance(self._answer, list) or not self._answer:
            return b""
        piece = self._answer.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return piece


class Never(Exchange):
    async def start(self) -> Head:
        await asyncio.Event().wait()
        raise AssertionError


class Lease:
    def __init__(self, server: Server, seat: Seat = HERE, model: str = "m") -> None:
        self.server = server
        self.seat = seat
        self.spec = SimpleNamespace(id=seat.backend, model=model)
        self.identity = SimpleNamespace(model="default_model", is_mlx=True)
        self.last_byte_at = asyncio.get_running_loop().time() + 1.0
        self.released = 0
        self.whole: bool | None = None
        self.read = (0, 0, 0.0)
        self.completed = self.failed = False

    def open(self, request: Request) -> Exchange:
        answer = self.server.take(request)
        return Never([]) if answer is None else Exchange(answer)

    def report(self, progress: object) -> None:
        self.progress = progress

    def hang_up(self, *, whole: bool) -> None:
        self.whole = whole

    def release(self) -> None:
        self.released += 1


class Attempts:
    """``failures``: that the request was told of."""

    def __init__(self) -> None:
        self.failures: list[CallFailure] = []

    def counts(self, _state: object, failure: CallFailure) -> bool:
        return failure is CRASH

    async def failed(self, _state: object, lease: Lease, failure: CallFailure, *, chars: int) -> None:
        assert chars == len(lease.server.prompts[-1]), "what was sent, not all of the prompt"
        self.failures.append(failure)

    async def refusal(self, *_: object) -> CallFailure:
        return BAD

    async def diagnose(self, *_: object) -> CallFailure:
        return CRASH

    async def incomplete(self, *_: object) -> CallFailure:
        return CRASH


class Pool:
    """``sliced``: prompts that are told to be read in slices, and where."""

    def __init__(self, scene: "Scene") -> None:
        self._scene = scene
        self.sliced: dict[object, str] = {}

    def has_another(self, _name: str) -> bool:
        return self._scene.another

    def begins_slices(self, prompt: object, backend: str) -> None:
        self.sliced[prompt] = backend

    def has_slices_beside(self, prompt: object, backend: str) -> bool:
        return any(other is not prompt and where == backend for other, where in self.sliced.items())

    def ends_slices(self, prompt: object) -> None:
        self.sliced.pop(prompt, None)


class Scene:
    """``leases``: those that were given out. ``turns``: for each turn a seat, or a refusal; then the last one;
    ``acquired``: likewise, before the first slice."""

    def __init__(
        self,
        server: Server,
        turns: Iterable[Seat | Denied] = (),
        *,
        proven: bool = True,
        acquired: Iterable[Seat | Denied] = (HERE,),
    ) -> None:
        loop = asyncio.get_running_loop()
        self.server, self.attempts, self.guard = server, Attempts(), RequestGuard({"m": None})
        self.leases: list[Lease] = []
        self.model_of: dict[Seat, str] = {}
        self._turns = iter(turns)
        self._acquired = iter(acquired)
        counter = SimpleNamespace(cut=self._cut, script=self._script)
        self.prompt = PROMPT
        client = SimpleNamespace(headers_sent=True)
        self.told: list[Callable[[], str]] = []
        self.said: list[str] = []
        progress = Progress(slicing=Slicing(len(PROMPT), len(PROMPT), 0, proven=proven))
        self.state: Any = SimpleNamespace(
            client=client,
            tell_while_waiting=self._waits,
            progress=progress,
            parsed=SimpleNamespace(stream=True, params={}, kind=Kind.COMPLETION),
            model="m",
            deadline=None,
            responder=SimpleNamespace(progress=None),
        )
        workers = SimpleNamespace(run=self._run, work_on=lambda _, work: self._run(work))
        self.another = False  # replica that takes other requests meanwhile
        self.pool = Pool(self)
        fleet = SimpleNamespace(
            backends=dict.fromkeys(("m:0", "m:1"), SimpleNamespace(flight=SimpleNamespace(reading=ReadingRate()))),
            pools={"m": self.pool},
        )
        self.slices = Slices(
            fleet,  # type: ignore[arg-type]
            {"m": SimpleNamespace(counter=counter, request=RULES)},  # type: ignore[dict-item]
            SimpleNamespace(turn=self._turn, acquire=self._acquire),  # type: ignore[arg-type]
            self.attempts,  # type: ignore[arg-type]
            guard=self.guard,
            workers=workers,  # type: ignore[arg-type]
            clock=loop.time,
        )

    async def _run(self, work: Callable[[], Any]) -> Any:
        return work()

    async def _script(self, _kind: object, params: Mapping[str, Any], *, counted: bool) -> Script:
        assert params == {"temperature": 1}
        assert not counted
        return Script(self.prompt, 0, exact=False)

    async def _cut(self, _text: str, near: int) -> Cut:
        return Cut(near - near % 8 + 7, NEXT, " ")

    async def _turn(self, *_: object) -> Any:
        self.said += [told() for told in self.told]
        seat = next(self._turns, self.leases[-1].seat)
        return self.lease(seat) if isinstance(seat, Seat) else seat

    def _waits(self, told: Callable[[], str]) -> Callable[[], None]:
        self.told.append(told)
        return lambda: self.told.remove(told)

    def lease(self, seat: Seat = HERE) -> Lease:
        self.leases.append(Lease(self.server, seat, self.model_of.get(seat, "m")))
        return self.leases[-1]

    async def _acquire(self, *_: object) -> Any:
        seat = next(self._acquired)
        return self.lease(seat) if isinstance(seat, Seat) else seat

    async def read(self) -> Any:
        return await self.slices.lease(self.state)

    def assert_over(self, last: object = None) -> None:
        """Each lease was given back once, but for the one that was returned."""
        assert [lease.released for lease in self.leases] == [int(lease is not last) for lease in self.leases]
        assert self.told == []
        assert not self.pool.sliced


def begin(texts: Sequence[str]) -> bool:
    return all(PROMPT.startswith(text) for text in texts) and list(map(len, texts)) == sorted(set(map(len, texts)))


async def test_it_is_read_whole_where_the_others_have_another_replica() -> None:
    scene = Scene(Server())
    scene.another = True
    first = await scene.read()
    assert isinstance(first, Lease)
    assert not first.released
    assert not scene.server.bodies


async def test_each_slice_goes_on_from_the_last_and_the_request_comes_after_them() -> None:
    scene = Scene(Server())
    last = await scene.read()
    assert last is scene.leases[-1]
    scene.assert_over(last)
    server = scene.server
    assert len(server.bodies) == len(scene.leases) - 1 >= 3
    assert begin(server.prompts)
    assert set(server.forced) == {NEXT}
    assert {(body["max_tokens"], body["temperature"], body["stream"]) for body in server.bodies} == {(1, 0, True)}
    read = [lease.read[:2] for lease in scene.leases[:-1]]
    assert read == [
        (len(text), found) for text, found in zip(server.prompts, [0, *map(len, server.prompts)], strict=False)
    ]
    assert all(lease.completed and lease.whole for lease in scene.leases[:-1])
    assert scene.state.progress.tries == 0
    assert scene.said[0] == f"reading the prompt, {len(server.prompts[0])} of {len(PROMPT)} tokens so far"


async def test_the_first_slice_of_a_model_forces_another_token() -> None:
    """The second finds it only if the prompt cache can be cut back."""
    scene = Scene(Server(), proven=False)
    await scene.read()
    assert scene.server.forced[0] != NEXT
    assert set(scene.server.forced[1:]) == {NEXT}
    assert scene.slices.abilities.of("m", 0.0) is Ability.YES


async def test_a_model_that_cannot_gets_the_whole_after_two_slices() -> None:
    scene = Scene(Server(able=False), proven=False)
    last = await scene.read()
    assert len(scene.server.bodies) == 2
    scene.assert_over(last)
    assert scene.slices.abilities.of("m", 0.0) is Ability.NO


GONE = ExchangeError(Fault.RESET, "gone")


@pytest.mark.parametrize("end", [GONE, [b": keepalive 1/9\n\n"], [LAST_TOKEN, GONE]])
async def test_a_failure_is_one_of_the_request(end: Any) -> None:
    scene = Scene(Server({3: end}))
    assert await scene.read() is CRASH
    scene.assert_over()
    assert scene.attempts.failures == [CRASH]
    assert scene.state.progress.tries == 1, "whatever came before"
    assert (scene.leases[-1].failed, scene.leases[-1].whole) == (True, False)


async def test_a_slice_that_is_refused_says_nothing_of_the_request() -> None:
    scene = Scene(Server({2: 400}))
    last = await scene.read()
    scene.assert_over(last)
    assert len(scene.server.bodies) == 2
    assert scene.attempts.failures == []
    assert scene.state.progress.tries == 0
    assert scene.slices.abilities.of("m", 0.0) is not Ability.NO


async def test_no_turn_comes() -> None:
    denied = Denied(Refusal(Why.QUEUE_TIMEOUT), "m")
    scene = Scene(Server(), [HERE, denied])
    assert await scene.read() is denied
    scene.assert_over()


NO_REPLICA = Denied(Refusal(Why.UNAVAILABLE), "m")
ELSEWHERE = Seat("fallback:0", 1)


async def test_where_no_replica_is_left_to_go_on_the_chain_is_looked_at_again() -> None:
    scene = Scene(Server(), [HERE, NO_REPLICA], acquired=[HERE, ELSEWHERE])
    scene.model_of[ELSEWHERE] = "fallback"
    last = await scene.read()
    assert last is scene.leases[-1]
    assert last.seat == ELSEWHERE
    scene.assert_over(last)
    assert len(scene.server.bodies) == 2
    assert scene.state.progress.slicing is None

    scene = Scene(Server(), [HERE, NO_REPLICA, NO_REPLICA, NO_REPLICA, NO_REPLICA], acquired=[HERE, THERE] * 5)
    last = await scene.read()
    assert isinstance(last, Lease), "it is sent whole in the end"
    scene.assert_over(last)

    scene = Scene(Server(), [NO_REPLICA], acquired=[HERE, NO_REPLICA])
    assert await scene.read() is NO_REPLICA


async def test_the_pool_knows_which_prompts_are_in_slices() -> None:
    scene = Scene(Server({2: None}))
    reading = asyncio.ensure_future(scene.read())
    await scene.server.at_work.wait()
    assert scene.pool.sliced == {scene.state.progress.slicing: "m:0"}
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await reading
    scene.assert_over()


async def test_the_client_leaves_while_a_slice_is_read() -> None:
    scene = Scene(Server({2: None}))
    reading = asyncio.ensure_future(scene.read())
    await scene.server.at_work.wait()
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await reading
    scene.assert_over()
    assert scene.leases[-1].whole is False, "the backend may be at work on it"
    assert scene.attempts.failures == []


async def test_no_lease_is_lost_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_cut", "_script"):
        scene = Scene(Server())

        async def fails(*_: object, **__: object) -> None:
            raise RuntimeError("no space left on device")

        monkeypatch.setattr(scene.slices, name, fails)
        with pytest.raises(RuntimeError, match="no space"):
            await scene.read()
        scene.assert_over()


async def test_it_begins_again_on_another_replica() -> None:
    scene = Scene(Server(), [HERE, THERE])
    last = await scene.read()
    scene.assert_over(last)
    sizes = list(map(len, scene.server.prompts))
    assert sizes[0] < sizes[1] > sizes[2], sizes
    assert begin(scene.server.prompts[2:])


async def test_a_slice_that_may_be_cached_whole_is_cut_further_on() -> None:
    """It would end the generation thread."""
    plain = Scene(Server())
    await plain.read()
    first = plain.server.prompts[0]

    scene = Scene(Server())
    scene.guard.cached.sent(HERE, Prompt(text=Text(first[:-5], 2 * MARGIN), exact=b"another"))
    trace = scene.guard.cached.sent(HERE, Prompt(text=Text(first[:-1], 2 * MARGIN), exact=b"its answer"))
    assert trace is not None
    trace.add(first[-1])
    last = await scene.read()
    scene.assert_over(last)
    assert len(scene.server.prompts[0]) >= len(first) + FURTHER - 8
    assert begin(scene.server.prompts)


async def test_what_a_slice_leaves_is_on_record_until_the_next_takes_its_place() -> None:
    scene = Scene(Server({3: None}))
    reading = asyncio.ensure_future(scene.read())
    await scene.server.at_work.wait()
    first, second, _ = (Prompt(text=Text(f"{text} ", 2 * MARGIN), exact=b"") for text in scene.server.prompts)
    assert not scene.guard.cached.may_hold(HERE, first)
    assert scene.guard.cached.may_hold(HERE, second)
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await reading


async def test_a_prompt_that_is_another_by_now_is_sent_as_it_is() -> None:
    scene = Scene(Server())
    scene.prompt += " at 17:01"
    last = await scene.read()
    assert last is scene.leases[0]
    assert scene.server.bodies == []


async def test_a_request_that_does_not_find_what_its_slices_have_read() -> None:
    """The server has another template than the files of the model."""
    scene = Scene(Server())
    await scene.read()
    unread = len(PROMPT) - 12
    scene.state.responder = SimpleNamespace(progress=(unread, unread), usage={"prompt_tokens": len(PROMPT)})
    scene.slices.answered(scene.state)
    now = asyncio.get_running_loop().time()
    assert scene.slices.abilities.of("m", now) is Ability.NO
    assert scene.slices.abilities.of("m", now + LOST + 1) is Ability.YES, "it may have been pushed out"


@pytest.mark.parametrize(("losses", "ability"), [({3}, Ability.YES), ({3, 5}, Ability.NO)])
async def test_a_prompt_that_loses_its_slices_again_and_again_is_sent_as_it_is(
    losses: set[int], ability: Ability
) -> None:
    server = Server(losses=losses)
    scene = Scene(server)
    last = await scene.read()
    scene.assert_over(last)
    assert (len(server.bodies) == 5) is (ability is Ability.NO)
    assert len(server.bodies) >= 5
    assert scene.slices.abilities.of("m", asyncio.get_running_loop().time()) is ability


@pytest.mark.parametrize(
    "change",
    [
        {"isolation": Isolation.ALONE},
        {"guarded": True},
        {"slicing": None},
    ],
)
async def test_what_must_be_alone_is_sent_as_it_is(change: dict[str, Any]) -> None:
    scene = Scene(Server())
    for name, value in change.items():
        setattr(scene.state.progress, name, value)
    last = await scene.read()
    assert last is scene.leases[0]
    assert scene.server.bodies == []
    assert scene.state.progress.slicing is None


async def test_where_there_is_one_slice_the_request_itself_shows_the_ability() -> None:
    for found, ability in ((0, Ability.NO), (1999, Ability.NO), (2000, Ability.YES)):
        unread = len(PROMPT) - found
        scene = Scene(Server(), proven=False)
        plan = scene.state.progress.slicing
        plan.sit(HERE)
        plan.count, plan.read = 1, 2000
        scene.state.responder = SimpleNamespace(progress=(unread, unread))
        scene.state.progress.usage = Usage(len(PROMPT))
        scene.slices.answered(scene.state)
        assert scene.slices.abilities.of("m", 0.0) is ability
