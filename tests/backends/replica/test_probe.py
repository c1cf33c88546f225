import json

from backends.replica import probe


def test_the_canary_is_one_greedy_token() -> None:
    chat, text = probe.canary_request("m"), probe.canary_request("m", chat=False)
    assert (chat.method, chat.path, text.path) == ("POST", "/v1/chat/completions", "/v1/completions")
    for request in (chat, text):
        body = json.loads(request.body)
        assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("m", 1, 0, False)
        assert (b"content-type", b"application/json") in request.headers
    assert json.loads(chat.body)["messages"] == [{"role": "user", "content": "hi"}]
    assert json.loads(text.body)["prompt"] == "hi"


def test_the_probe_of_health_carries_nothing() -> None:
    request = probe.health_request()
    assert (request.method, request.path, request.body) == ("GET", "/health", b"")
