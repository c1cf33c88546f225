"""Servers of other kinds, started by ``command``, that go wrong in every way the fake knows.

A server that is not mlx_lm.server may say 503 when it is merely busy, so here silence and the end of the process count.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.integration.harness import QUICK_RESTART, Background, Gateway, fake, launched, wait_until
from tests.integration.wire import Answer, Json, chat, endless, lasting, whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    hasty: Json = {"restart": QUICK_RESTART, "timeouts": {"progress": "3s", "stop": "1s"}, "resume": "off"}
    models = {"tiny": fake(replicas=2, **hasty), "lone": fake(**hasty)}
    with launched({"models": models}, tmp_path_factory.mktemp("command")) as running:
        yield running


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    shared.await_health()
    return shared


def pids(gateway: Gateway, model: str) -> list[int]:
    return [b["pid"] for b in gateway.health()["models"][model]["backends"]]


def last_failure(gateway: Gateway, answer: Answer) -> Json:
    assert answer.error is not None, answer
    return gateway.await_failure(answer.error["backend"])


def assert_tail(answer: Answer, code: str, words: int) -> None:
    """An error after so many words: told, and told only once."""
    assert (answer.status, answer.dropped, answer.done, answer.finish) == (200, "", True, None)
    assert answer.code == code
    assert len(answer.text.split()) == words
    assert [("error" in event) for event in answer.events] == [False] * (len(answer.events) - 1) + [True]


# -- the process is gone -----------------------------------------------------------------------------------------------

ABORTS = [
    ("metal-oom", "oom", "backend_oom", -6),
    ("gpu-timeout", "gpu_timeout", "backend_gpu_error", -6),
    ("gpu-fault", "gpu_fault", "backend_gpu_error", -6),
    ("killed", "killed", "backend_crashed", -9),
    ("segfault", "native_crash", "backend_crashed", -11),
]


@pytest.mark.parametrize(("mode", "cause", "code", "status"), ABORTS)
def test_death_in_mid_stream(gateway: Gateway, *, mode: str, cause: str, code: str, status: int) -> None:
    old = gateway.backend("lone:0")
    answer = gateway.ask(chat(f"FAKE {mode} after=4 delay=0.02", "lone", stream=True))
    assert_tail(answer, code, 4)
    failure = last_failure(gateway, answer)
    assert (failure["cause"], failure["exit"]) == (cause, status)
    assert gateway.await_life("lone:0", old["pid"])["restarts"] == old["restarts"] + 1
    assert whole(gateway.ask(chat("hello", "lone")))


@pytest.mark.parametrize("stream", [True, False])
def test_death_before_the_first_word_goes_unnoticed(gateway: Gateway, tmp_path: Path, stream: bool) -> None:
    story = f"FAKE killed after=-1 once={tmp_path / 'done'}"
    answer = gateway.ask(chat(story, stream=stream))
    assert whole(answer)
    assert answer.attempts == 2
    assert answer.text == gateway.ask(chat(story)).text


def test_death_in_the_middle_of_an_answer_that_is_not_streamed(gateway: Gateway, tmp_path: Path) -> None:
    answer = gateway.ask(chat(f"FAKE segfault after=4 delay=0.02 once={tmp_path / 'done'}"))
    assert whole(answer)
    assert answer.attempts == 2
    assert len(answer.text.split()) == 20


def test_a_request_that_runs_out_of_memory_alone_is_not_tried_again(gateway: Gateway) -> None:
    """It would do the same to the next replica."""
    before = gateway.health()["models"]["tiny"]["backends"]
    answer = gateway.ask(chat("FAKE metal-oom after=-1"))
    assert (answer.status, answer.code, answer.attempts) == (503, "backend_oom", 1)
    assert answer.headers["x-should-retry"] == "false"
    assert answer.error is not None
    assert "Insufficient Memory" in answer.error["message"]
    gateway.await_health()
    restarts = sum(b["restarts"] for b in gateway.health()["models"]["tiny"]["backends"])
    assert restarts == sum(b["restarts"] for b in before) + 1


# -- the process lives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_dead_generation_thread_that_nobody_tells_of(gateway: Gateway, tmp_path: Path, stream: bool) -> None:
    """mlx-lm 0.28.4 to 0.31.3: /health says 200, requests wait for ever. Silence gives it away, and the traceback
    names it."""
    story = f"FAKE wedge-0.31 after=-1 once={tmp_path / 'done'}"
    before = {b["id"]: b for b in gateway.health()["models"]["tiny"]["backends"]}
    answer = gateway.ask(chat(story, stream=stream))
    assert whole(answer)
    assert answer.attempts == 2
    (victim,) = [b for b in before if b != answer.headers["x-gateway-backend"]]
    told = gateway.await_life(victim, before[victim]["pid"])
    assert told["last_failure"]["cause"] == "wedge"
    assert told["restarts"] == before[victim]["restarts"] + 1


def test_dead_generation_thread_in_mid_stream(gateway: Gateway) -> None:
    old = gateway.backend("lone:0")["pid"]
    answer = gateway.ask(chat("FAKE wedge-0.31 after=4", "lone", stream=True))
    assert_tail(answer, "backend_wedged", 4)
    assert last_failure(gateway, answer)["cause"] == "wedge"
    gateway.await_life("lone:0", old)


def test_stall_in_mid_stream(gateway: Gateway) -> None:
    old = gateway.backend("lone:0")["pid"]
    answer = gateway.ask(chat("FAKE stall after=4", "lone", stream=True))
    assert_tail(answer, "backend_stalled", 4)
    assert last_failure(gateway, answer)["cause"] == "stalled"
    gateway.await_life("lone:0", old)


def test_one_stuck_request_among_others_that_go_on(gateway: Gateway) -> None:
    """It alone is ended; its neighbour, and the process, stay."""
    old = gateway.backend("lone:0")
    with gateway.stream(endless("lone")) as neighbour:
        neighbour.until_text()
        stuck = Background(lambda: gateway.ask(chat("FAKE stall after=4\nin company", "lone", stream=True)))
        wait_until(lambda: neighbour.event() is not None and not stuck.running)
        assert_tail(stuck.result(), "backend_stalled", 4)
        neighbour.until_text(len(neighbour.answer.text) + 100)
    now = gateway.backend("lone:0")
    assert (now["pid"], now["restarts"]) == (old["pid"], old["restarts"])


def test_silence_before_the_first_word(gateway: Gateway, tmp_path: Path) -> None:
    answer = gateway.ask(chat(f"FAKE native-hang after=-1 once={tmp_path / 'done'}", stream=True))
    assert whole(answer)
    assert answer.attempts == 2


# -- answers that end too early ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("mode", ["eof-before-head", "eof after=0"])
def test_the_end_before_the_first_word(gateway: Gateway, tmp_path: Path, mode: str, stream: bool) -> None:
    before = pids(gateway, "tiny")
    answer = gateway.ask(chat(f"FAKE {mode} once={tmp_path / 'done'}", stream=stream))
    assert whole(answer)
    assert answer.attempts == 2
    assert pids(gateway, "tiny") == before


def test_the_end_before_the_first_word_everywhere(gateway: Gateway) -> None:
    before = pids(gateway, "tiny")
    answer = gateway.ask(chat("FAKE eof-before-head"))
    assert (answer.status, answer.code, answer.attempts) == (503, "stream_truncated", 2)
    assert pids(gateway, "tiny") == before


@pytest.mark.parametrize("mode", ["eof", "cut-event"])
def test_the_end_in_mid_stream(gateway: Gateway, mode: str) -> None:
    before = gateway.backend("lone:0")["pid"]
    answer = gateway.ask(chat(f"FAKE {mode} after=4", "lone", stream=True))
    assert_tail(answer, "stream_truncated", 4)
    assert gateway.backend("lone:0")["pid"] == before


def test_the_end_in_the_middle_of_an_answer_that_is_not_streamed(gateway: Gateway, tmp_path: Path) -> None:
    answer = gateway.ask(chat(f"FAKE cut-event after=4 once={tmp_path / 'done'}"))
    assert whole(answer)
    assert (answer.attempts, len(answer.text.split())) == (2, 20)


def test_finish_reason_without_done_is_whole(gateway: Gateway) -> None:
    answer = gateway.ask(chat("FAKE no-done", stream=True))
    assert whole(answer)
    assert answer.done
    assert answer.attempts == 1


def test_done_without_finish_reason_is_whole(gateway: Gateway) -> None:
    """And no finish_reason is made up."""
    answer = gateway.ask(chat("FAKE no-finish", stream=True))
    assert (answer.status, answer.error, answer.done, answer.finish) == (200, None, True, None)
    assert len(answer.text.split()) == 20


# -- what is no failure ------------------------------------------------------------------------------------------------


def test_forged_lines_condemn_nobody(gateway: Gateway, tmp_path: Path) -> None:
    """A client can have any line printed; the request, the process and the next requests are well."""
    old = gateway.backend("lone:0")
    seen = tmp_path / "seen"
    with gateway.stream(lasting(seen, "lone", "forged")) as stream:
        stream.until_text(50)
        assert "mlx_lm.server generation thread died" in gateway.output("lone:0")
        seen.touch()
        assert whole(stream.rest())
    assert whole(gateway.ask(chat("hello", "lone")))
    now = gateway.backend("lone:0")
    assert (now["pid"], now["restarts"], now["last_failure"]) == (old["pid"], old["restarts"], old["last_failure"])


def test_forged_lines_do_not_name_a_later_death(launch: Launch) -> None:
    gateway = launch({"models": {"tiny": fake(restart=QUICK_RESTART)}})
    assert whole(gateway.ask(chat("FAKE forged after=1")))
    answer = gateway.ask(chat("FAKE segfault after=4", stream=True))
    assert_tail(answer, "backend_crashed", 4)
    assert last_failure(gateway, answer)["cause"] == "native_crash"


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_of_one_request_is_tried_once_more_elsewhere(gateway: Gateway, stream: bool) -> None:
    before = pids(gateway, "tiny")
    answer = gateway.ask(chat("FAKE status=500", stream=stream))
    assert (answer.status, answer.code, answer.attempts) == (500, "generation_failed", 2)
    assert pids(gateway, "tiny") == before


# -- starts ------------------------------------------------------------------------------------------------------------


def test_starts(launch: Launch) -> None:
    short: Json = {"timeouts": {"start": "4s", "stop": "1s"}, "restart": {"max_failures": 1, "max_backoff": "10m"}}
    models = {
        "tiny": fake(),
        "dependency": fake("exit-at-start", **short),
        "absent": {"command": ["/nonexistent/server", "{port}"], "model": "x", **short},
        "hanging": fake("load-hang", **short),
        "slow": fake("slow-load load-time=600", **short),
        "portless": fake("bind-failure", **short),
    }
    gateway = launch({"models": models}, ready=False)
    expected = {
        "dependency": "dependency",
        "absent": "dependency",
        "hanging": "load_failure",
        "slow": "start_timeout",
        "portless": "port_in_use",
    }
    lasting = {"dependency", "absent", "hanging"}
    down = {name: gateway.await_state(f"{name}:0", "failed" if name in lasting else "backoff") for name in expected}
    assert {name: told["last_failure"]["cause"] for name, told in down.items()} == expected
    assert {name for name, told in down.items() if told["crash_looping"]} == set(expected) - lasting
    assert "/nonexistent/server" in gateway.backend("absent:0")["last_failure"]["message"]
    assert whole(gateway.ask(chat("hello")))
    assert gateway.backend("tiny:0")["restarts"] == 0
