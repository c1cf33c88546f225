"""The command line, the environment and the probes of mlx_lm.server."""

import json
import sys

from backends import mlx


def flags(argv: tuple[str, ...]) -> list[str]:
    """What follows the fixed beginning."""
    head = (sys.executable, "-m", "mlx_lm", "server", "--model", "org/m", "--host", "{host}", "--port", "{port}")
    assert argv[: len(head)] == head
    return list(argv[len(head) :])


def test_the_defaults_keep_answers_whole_and_caches_bounded() -> None:
    assert flags(mlx.argv("org/m", {})) == ["--max-tokens", "8192", "--prompt-cache-bytes", "4GB"]


def test_the_operator_wins_over_the_defaults() -> None:
    assert flags(mlx.argv("org/m", {"max-tokens": 5, "prompt-cache-bytes": None})) == ["--max-tokens", "5"]


def test_flags_without_a_value_and_flags_left_out() -> None:
    given = {"max-tokens": None, "prompt-cache-bytes": False, "trust-remote-code": True, "pipeline": False, "temp": 0.0}
    assert flags(mlx.argv("org/m", given)) == ["--trust-remote-code", "--temp", "0.0"]


def test_where_it_listens_is_filled_in_for_each_life() -> None:
    line = mlx.argv("org/m", {"host": "127.0.0.2", "port": 9000, "max-tokens": None, "prompt-cache-bytes": None})
    assert flags(line) == []
    assert all(isinstance(word, str) for word in line)


def test_the_environment() -> None:
    everywhere = mlx.environment(local_folder=False)
    assert everywhere["PYTHONUNBUFFERED"] == everywhere["PYTHONFAULTHANDLER"] == "1"
    assert "HF_HUB_OFFLINE" not in everywhere
    assert mlx.environment(local_folder=True) == {**everywhere, "HF_HUB_OFFLINE": "1"}


def test_the_canary_is_one_greedy_token() -> None:
    chat, text = mlx.canary_request("m"), mlx.canary_request("m", chat=False)
    assert (chat.method, chat.path, text.path) == ("POST", "/v1/chat/completions", "/v1/completions")
    for request in (chat, text):
        body = json.loads(request.body)
        assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("m", 1, 0, False)
        assert (b"content-type", b"application/json") in request.headers
    assert json.loads(chat.body)["messages"] == [{"role": "user", "content": "hi"}]
    assert json.loads(text.body)["prompt"] == "hi"


def test_the_probe_of_health_carries_nothing() -> None:
    request = mlx.health_request()
    assert (request.method, request.path, request.body) == ("GET", "/health", b"")
