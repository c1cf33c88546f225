"""Many models within one memory, with real servers: models of several sizes that share a budget set low."""

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.harness import Background, Gateway, launched, wait_until
from tests.integration.wire import Answer, Json, chat, endless, whole

pytestmark = pytest.mark.slow

SIZES = {"small": (64, 2), "middle": (96, 3), "large": (128, 4)}  # hidden, layers
TAKES = "500MiB"  # of each: more than any of them takes, so that two fit and no third


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = "from pathlib import Path; from gateway.cli.demo_model.model import make_tiny_model as m; import sys; "
    made += "m(Path(sys.argv[1]), hidden=int(sys.argv[2]), layers=int(sys.argv[3]))"
    for name, (hidden, layers) in SIZES.items():
        subprocess.run([sys.executable, "-c", made, root / name, str(hidden), str(layers)], check=True)
    return {name: str(root / name) for name in SIZES}


def config(folders: dict[str, str], models: Json | None = None, *, budget: str = "1100MiB") -> Json:
    loaded = {name: {"model": folder} for name, folder in folders.items()} | (models or {})
    defaults = {"load": "on_demand", "memory": TAKES, "resume": "off"}  # its test would be a use of the model
    return {"server": {"keepalive": "200ms"}, "memory": {"budget": budget}, "defaults": defaults, "models": loaded}


@pytest.fixture(scope="module")
def gateway(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    models: dict[str, Json] = {
        "huge": {"model": folders["small"], "memory": "2GiB"},
        "sized": {"model": folders["small"], "server_args": {"prompt-cache-bytes": "64MB"}},
        "passing": {"model": folders["small"], "idle_unload": "1s"},
    }
    with launched(config(folders, models), tmp_path_factory.mktemp("memory"), ready=False) as running:
        running.await_health()
        yield running


def short(model: str) -> Json:
    return chat("hello", model, max_tokens=8)


def state(gateway: Gateway, model: str) -> str:
    return str(gateway.backend(f"{model}:0")["state"])


def message(answer: Answer) -> str:
    return "" if answer.error is None else str(answer.error["message"])


def unloaded(gateway: Gateway) -> None:
    for model in gateway.health()["models"]:
        gateway.http.post(f"/api/models/{model}/unload")
    wait_until(lambda: {state(gateway, model) for model in gateway.health()["models"]} == {"unloaded"})


def test_nothing_is_loaded_before_somebody_asks_and_health_says_so(gateway: Gateway) -> None:
    unloaded(gateway)
    told = gateway.health()
    assert told["status"] == "ok"
    assert {model["status"] for model in told["models"].values()} == {"unloaded"}
    assert gateway.http.get("/readyz").status_code == 200


def test_the_least_recently_used_goes(gateway: Gateway) -> None:
    unloaded(gateway)
    assert whole(gateway.ask(short("small")))
    assert whole(gateway.ask(short("middle")))
    assert whole(gateway.ask(short("small")))
    assert whole(gateway.ask(short("large")))
    assert [state(gateway, model) for model in SIZES] == ["ready", "unloaded", "ready"]
    assert whole(gateway.ask(short("middle")))
    assert [state(gateway, model) for model in SIZES] == ["unloaded", "ready", "ready"]


def test_who_waits_for_a_load_is_kept_alive_by_comments_and_health_shows_how_far_it_is(gateway: Gateway) -> None:
    """By comments from the first second on; one that is answered before has the wait in a header."""
    unloaded(gateway)
    asked = Background(lambda: gateway.ask({**short("small"), "stream": True}))
    progress = wait_until(lambda: gateway.backend("small:0").get("loading")) or {}
    assert progress["phase"] in {"launching", "loading"}
    assert gateway.health()["models"]["small"]["status"] == "loading"
    answer = asked.result()
    assert whole(answer)
    assert answer.comments or answer.headers["x-gateway-queue"].endswith(": loading")
    assert "loading" not in gateway.backend("small:0")


def test_one_with_a_request_in_flight_does_not_go(gateway: Gateway) -> None:
    unloaded(gateway)
    with gateway.stream(endless("small")) as one, gateway.stream(endless("middle")) as two:
        one.until_text()
        two.until_text()
        third = Background(lambda: gateway.ask(short("large")))
        wait_until(lambda: gateway.backend("large:0").get("loading", {}).get("phase", "").startswith("waits"))
        one.until_text(len(one.answer.text) + 50)
        assert [state(gateway, model) for model in ("small", "middle")] == ["ready", "ready"]
        assert third.running
    assert whole(third.result())


def test_what_can_never_fit_is_told_with_the_numbers_and_nobody_goes_for_it(gateway: Gateway) -> None:
    unloaded(gateway)
    assert whole(gateway.ask(short("small")))
    pid = gateway.backend("small:0")["pid"]
    answer = gateway.ask(short("huge"))
    assert (answer.status, answer.code) == (503, "insufficient_memory")
    assert "huge:0 needs about 2.0 GiB" in message(answer)
    assert "600 MiB of the budget of 1.1 GiB are left" in message(answer)
    assert 1 <= int(answer.headers["retry-after"]) <= 59
    assert gateway.backend("small:0")["pid"] == pid
    assert whole(gateway.ask(short("small")))


def test_one_that_nobody_uses_is_unloaded_and_comes_back(gateway: Gateway) -> None:
    unloaded(gateway)
    assert whole(gateway.ask(short("passing")))
    gateway.await_state("passing:0", "unloaded")
    assert gateway.health()["models"]["passing"]["status"] == "unloaded"
    assert whole(gateway.ask(short("passing")))


def test_loading_and_unloading_by_hand(gateway: Gateway) -> None:
    unloaded(gateway)
    assert gateway.http.post("/api/models/small/load").status_code == 202
    gateway.await_state("small:0", "ready")
    twice = gateway.http.post("/api/models/small/load")
    assert (twice.status_code, twice.json()["error"]["code"]) == (409, "conflict")
    assert gateway.http.post("/api/models/small/unload").json() == {"id": "small", "status": "unloaded"}
    gateway.await_state("small:0", "unloaded")
    assert gateway.http.post("/api/models/none/load").status_code == 404
    assert gateway.http.post("/api/models/small/fly").status_code == 404


def test_a_prompt_cache_has_its_part_of_the_share_but_for_the_users_size(gateway: Gateway) -> None:
    unloaded(gateway)
    sizes = {}
    for model in ("small", "sized"):
        assert whole(gateway.ask(short(model)))
        backend = gateway.http.get("/api/status").json()["models"][model]["backends"][0]
        line = psutil.Process(backend["pid"]).cmdline()
        sizes[model] = line[line.index("--prompt-cache-bytes") + 1], line[line.index("--prompt-cache-size") + 1]
        share, report = backend["share"], backend["report"]
        assert share["base"] < share["total"] or share["source"] == "files"
        assert report["active"] + report["pooled"] <= backend["memory"]
    assert int(sizes["small"][0]) >= 256 << 20
    assert int(sizes["small"][1]) >= 64
    assert sizes["sized"] == ("64MB", "64")


def test_what_was_seen_is_kept(gateway: Gateway) -> None:
    unloaded(gateway)
    kept = json.loads((gateway.folder / "state" / "memory.json").read_text())
    assert len(kept) >= 1
    assert all(20 << 20 < peak < 500 << 20 for peak in kept.values())


def test_a_load_that_fails_answers_all_who_wait_with_its_cause(folders: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(folders["small"]).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in Path(folders["small"]).iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[:-10] if file.suffix == ".safetensors" else file.read_bytes())
    models: dict[str, Json] = {"broken": {"model": str(broken)}, "cut": {"model": str(cut)}}
    with launched(config({"small": folders["small"]}, models), tmp_path, ready=False) as gateway:
        assert whole(gateway.ask(short("small")))
        pid = gateway.backend("small:0")["pid"]
        waiting = [Background(lambda: gateway.ask(short("broken"))) for _ in range(4)]
        answers = [each.result() for each in waiting]
        assert {(answer.status, answer.code) for answer in answers} == {(503, "model_unavailable")}
        assert all("load_failure" in message(answer) for answer in answers)
        assert all("no-such-model not supported" in message(answer) for answer in answers)
        answer = gateway.ask(short("cut"))
        assert (answer.status, answer.code) == (503, "model_unavailable")
        assert "model.safetensors was cut short" in message(answer)
        assert gateway.backend("small:0")["pid"] == pid


def test_two_that_do_not_fit_together_take_turns(folders: dict[str, str], tmp_path: Path) -> None:
    """96 requests that alternate between them, 16 at a time: all are answered."""
    pair = {name: folders[name] for name in ("small", "large")}
    found: Counter[tuple[str, int]] = Counter()
    with launched(config(pair, budget="800MiB"), tmp_path, ready=False) as gateway:

        def ask(start: int) -> None:
            for n in range(start, 96, 16):
                model = ("small", "large")[n // 16 % 2]
                found[model, gateway.ask(chat(f"hello {n}", model, max_tokens=8)).status] += 1

        threads = [threading.Thread(target=ask, args=(start,)) for start in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        swaps = gateway.log.count("backend evicted")
    assert sum(found.values()) == 96
    assert {status for _, status in found} == {200}
    assert 1 <= swaps < 48, "what is queued for the one that is loaded is answered first"


def test_a_model_in_use_is_loaded_with_all_its_replicas(folders: dict[str, str], tmp_path: Path) -> None:
    """One request loads both, one after the other; one that is killed while the other answers comes back."""
    both: Json = {"model": folders["small"], "replicas": 2, "resume": "off"}
    with launched(config({}, {"small": both}), tmp_path, ready=False) as gateway:
        assert whole(gateway.ask(short("small")))
        for name in ("small:0", "small:1"):
            gateway.await_state(name, "ready")
        pid = gateway.signal_backend("small:0", 9)
        wait_until(lambda: gateway.health()["status"] == "degraded")
        assert whole(gateway.ask(short("small")))
        gateway.await_life("small:0", pid)
        gateway.await_health()


def test_a_conversation_stays_where_its_beginning_is_cached(folders: dict[str, str], tmp_path: Path) -> None:
    """Ten turns over two replicas, whatever the client calls its session; a first line that changes with each turn
    leaves nothing to be found, and so sends them round."""
    model: Json = {"model": folders["small"], "replicas": 2, "resume": "off"}  # its self-test wants a replica to itself
    with launched({"models": {"tiny": model}}, tmp_path) as gateway:
        together, cached = _conversation(gateway, "one", fixed=True)
        assert len(together) == 1
        spread, uncached = _conversation(gateway, "two", fixed=False)
        assert len(spread) == 2
        assert cached > uncached
        counted = gateway.http.get("/api/status").json()["models"]["tiny"]["prompt_cache"]
        assert counted["cached_tokens"] == cached + uncached
        assert counted["prompt_tokens"] > counted["cached_tokens"]
        residency = next(iter(together))
        gateway.signal_backend(residency, 9)
        assert whole(gateway.ask(short("tiny")))


def _conversation(gateway: Gateway, word: str, *, fixed: bool) -> tuple[set[str], int]:
    """The replicas that answered, and how many tokens they had cached."""
    messages = [{"role": "system", "content": f"{word} " * 20}]
    replicas, cached = set[str](), 0
    for turn in range(10):
        messages.append({"role": "user", "content": f"{word} and turn {turn}"})
        if not fixed:
            messages[0] = {"role": "system", "content": f"{turn} " + f"{word} " * 20}
        body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
        answer = gateway.ask(body, **{"x-session-id": f"{word}-{turn}"})
        assert answer.status == 200
        replicas.add(answer.headers["x-gateway-backend"])
        cached += answer.body["usage"]["prompt_tokens_details"]["cached_tokens"]
        messages.append({"role": "assistant", "content": answer.text})
    return replicas, cached
