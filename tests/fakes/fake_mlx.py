"""A fake of mlx_lm.server: same wire format, same failures, on demand. Standard library only; starts in 0.1 s.

    python fake_mlx.py --port 8080 --model tiny --mode "wedge-0.31 after=5"

Its behaviour is set by a few words: presets and KEY=VALUE, see plan.py. ``--mode`` sets it for the whole process; a
prompt, or last message, whose first line begins with ``FAKE`` sets it for its request: ``FAKE metal-oom after=5
delay=0.01``. With ``once=PATH`` only the first request or process fails (PATH is created as a mark), so that a replica,
or the next instance, answers the same request.

The text is a function of the prompt and the token's index, so two fakes give the same text; at a temperature without a
seed they do not. As in mlx_lm.server: HTTP/1.0, streams that end by closing, headers before the prefill, 404 for most
errors, raw bodies in the log, a generation thread that is not the HTTP thread, and three kinds of request that kill it.
"""

import argparse
import hashlib
import json
import logging
import os
import resource
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from signal import SIG_IGN, SIGTERM, signal
from threading import Event
from typing import Any, ClassVar, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere
from tests.fakes.engine import LOG, Engine, die, say
from tests.fakes.plan import SAYINGS, Plan, claimed, parse

WORDS = "amber birch cedar delta ember flint grove harbour indigo kelp larch mörk naïve 日本 🙂".split()  # noqa: SIM905


class CutError(Exception):
    """The connection is closed without an error."""


class Server(ThreadingHTTPServer):
    def __init__(self, args: argparse.Namespace, plan: Plan) -> None:
        self.model, self.plan, self.engine = args.model, plan, Engine(plan)
        if plan.load == "no-port":
            raise OSError(98, "Address already in use")
        super().__init__((args.host, args.port), Handler)


class Handler(BaseHTTPRequestHandler):
    ROUTES: ClassVar[dict[str, str]] = {
        "/v1/completions": "text_completion",
        "/v1/chat/completions": "chat.completion",
        "/chat/completions": "chat.completion",
    }

    @property
    def fake(self) -> Server:
        return cast("Server", self.server)

    def do_GET(self) -> None:
        if self.path == "/health":
            healthy = self.fake.engine.healthy
            self.reply(200 if healthy else 503, {"status": "ok" if healthy else "unavailable"})
        elif self.path.startswith("/v1/models"):
            self.reply(200, {"object": "list", "data": [{"id": self.fake.model, "object": "model", "created": 0}]})
        else:
            self.reply(404, b"Not Found")

    def do_POST(self) -> None:
        if self.path not in self.ROUTES:
            self.reply(404, b"Not Found")
            return
        if (length := self.headers.get("Content-Length")) is None:
            self.reply(411, {"error": "Content-Length header is required"})
            return
        raw = self.rfile.read(int(length)).decode()
        try:
            body = json.loads(raw)
        except json.JSONDecodeError as error:
            LOG.error("JSONDecodeError: %s - Raw body: %s", error, raw)
            self.reply(400, {"error": f"Invalid JSON in request body: {error}"})
            return
        for name, kind in (("max_tokens", int), ("stream", bool), ("model", str), ("temperature", (int, float))):
            if name in body and not isinstance(body[name], kind):
                self.reply(400, {"error": f"{name} must be of type {kind}"})
                return
        with suppress(CutError):
            Answer(self, body).send()

    def head(self, status: int, kind: str) -> None:
        """Buffered until end_headers; the access line is written at once."""
        self.send_response(status)
        self.send_header("Content-type", kind)
        self.send_header("Access-Control-Allow-Origin", "*")

    def reply(self, status: int, body: dict[str, Any] | bytes) -> None:
        self.head(status, "application/json")
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())


class Answer:
    """One completion, plain or streamed."""

    def __init__(self, handler: Handler, body: dict[str, Any]) -> None:
        self.handler, self.fake, self.body = handler, handler.fake, body
        self.engine = self.fake.engine
        self.kind = handler.ROUTES[handler.path]
        self.stream = bool(body.get("stream", False))
        self.prompt = body.get("prompt") if self.kind == "text_completion" else body.get("messages")
        last = self.prompt if isinstance(self.prompt, str) else (self.prompt or [{}])[-1]
        words = str(last.get("content", "") if isinstance(last, dict) else last)
        base = self.fake.plan
        self.plan = claimed(parse(words.splitlines()[0][4:], base), base) if words.startswith("FAKE") else base
        limit = int(body.get("max_completion_tokens") or body.get("max_tokens", 512))
        self.count, self.finish = min(self.plan.n, limit), "stop" if self.plan.n < limit else "length"
        self.size = self.plan.prompt or len(json.dumps(self.prompt).split())
        self.made = {
            "id": f"chatcmpl-{uuid.uuid4()}",
            "system_fingerprint": "0.32.2-0.32.4-fake",
            "created": int(time.time()),
        }
        seeded = not body.get("temperature") or body.get("seed") is not None
        self.salt = str(body.get("seed")) if seeded else str(uuid.uuid4())

    def send(self) -> None:
        time.sleep(self.plan.head_delay)
        if self.plan.status:
            self.handler.reply(self.plan.status, {"error": "fake"})
            return
        try:
            while not self.engine.loaded.wait(0.02):
                self.engine.check()
            self.engine.check()
            self.refuse()
        except (RuntimeError, ValueError) as error:
            self.handler.reply(404, {"error": str(error)})
            return
        if self.plan.after < 0:
            self.fail()
        self.handler.head(200, "text/event-stream" if self.stream else "application/json")
        (self.send_stream if self.stream else self.send_plain)()

    def refuse(self) -> None:
        """Fails on requests that mlx_lm.server cannot handle, with its messages; three kinds kill its generation
        thread."""
        if self.body.get("model", "default_model") not in (self.fake.model, "default_model"):
            raise ValueError(f"Repository Not Found for url: https://huggingface.co/api/models/{self.body['model']}")
        stop = self.body.get("stop") or []
        if not self.prompt and self.kind != "text_completion":
            raise ValueError("list index out of range")
        if not isinstance(self.prompt, str if self.kind == "text_completion" else list) or not self.prompt:
            self.engine.break_down("Sequence 1 has an empty prompt.")
        if not isinstance(stop, str) and not all(isinstance(word, str) for word in stop):
            self.engine.break_down("text input must be of type `str` (single example)")

    def tokens(self) -> Iterator[str]:
        self.engine.answering.add(self)
        try:
            yield from self.said()
        finally:
            self.engine.answering.discard(self)

    def said(self) -> Iterator[str]:
        for index in count() if self.plan.until else range(self.count):
            if index and self.plan.until and Path(self.plan.until).exists():
                self.count = index
                return
            if index == self.plan.after:
                self.fail()
            self.engine.check(self.plan.delay)
            own = str(os.getpid()) if 0 <= self.plan.diverge <= index else ""
            own += "crowd" if self.plan.crowd and len(self.engine.answering) > 1 else ""
            digest = hashlib.sha256(f"{self.prompt}\0{index}\0{self.salt}{own}".encode()).digest()
            yield f"{WORDS[digest[0] % len(WORDS)]}{digest[1]} "

    def fail(self) -> None:
        """Fails as planned. Returns only if the plan has no failure, or a later one."""
        match self.plan.fail:
            case "die":
                die(self.plan)
            case "wedge-0.31" | "wedge-0.32":
                self.engine.break_down(SAYINGS[self.plan.say] + ".", silent=self.plan.fail == "wedge-0.31")
            case "hang":
                self.engine.hang()
            case "stall":
                Event().wait()
            case "cut":
                event = self.event("half" if self.kind == "text_completion" else {"content": "half"}, None)
                self.write(event[: len(event) // 2])
                raise CutError
            case "eof":
                raise CutError
            case _:
                say(self.plan)

    def write(self, text: str) -> None:
        self.handler.wfile.write(text.encode())
        self.handler.wfile.flush()

    def event(self, part: dict[str, Any] | str, finish: str | None) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"text": part} if isinstance(part, str) else {"delta": {"role": "assistant", **part}}
        kind = self.kind if isinstance(part, str) else "chat.completion.chunk"
        return f"data: {json.dumps(self.frame(kind, choices=[choice]))}\n\n"

    def frame(self, kind: str, **rest: Any) -> dict[str, Any]:
        return {**self.made, "object": kind, "model": self.body.get("model", "default_model"), **rest}

    def usage(self) -> dict[str, int]:
        total = self.size + self.count
        return {"prompt_tokens": self.size, "completion_tokens": self.count, "total_tokens": total}

    def prefill(self) -> None:
        for done in [*range(2048, self.size - 1, 2048), *([self.size - 1] if self.size > 1 else []), self.size]:
            self.engine.check(self.plan.prefill_delay)
            LOG.info("Prompt processing progress: %s/%s", done, self.size)
            if self.stream:
                self.write(f": keepalive {done}/{self.size}\n\n")

    def call(self) -> list[dict[str, Any]]:
        function = {"name": "look_up", "arguments": '{"word": "harbour"}'}
        return [{"function": function, "type": "function", "id": str(uuid.uuid4()), "index": 0}]

    def send_stream(self) -> None:
        self.handler.end_headers()
        self.prefill()
        text = self.kind == "text_completion"
        for index, token in enumerate(self.tokens()):
            key = "reasoning" if index < self.plan.reasoning else "content"
            self.write(self.event(token if text else {key: token}, None))
        if self.plan.fail != "no-finish":
            tool = self.plan.tool and not text
            last: dict[str, Any] = {"tool_calls": self.call()} if tool else {}
            self.write(self.event("" if text else last, "tool_calls" if tool else self.finish))
        if self.plan.fail == "hold":
            self.handler.connection.recv(1)
            raise CutError
        options = self.body.get("stream_options")
        if options is not None and options["include_usage"]:  # without the key mlx_lm.server fails here too
            self.write(f"data: {json.dumps(self.frame('chat.completion', choices=[], usage=self.usage()))}\n\n")
        if self.plan.fail != "no-done":
            self.write("data: [DONE]\n\n")

    def send_plain(self) -> None:
        self.prefill()
        tokens = list(self.tokens())
        thought = self.plan.reasoning
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish}
        if self.kind == "text_completion":
            choice["text"] = "".join(tokens)
        else:
            choice["message"] = {"role": "assistant", "content": "".join(tokens[thought:]) or None}
            if thought:
                choice["message"]["reasoning"] = "".join(tokens[:thought])
            if self.plan.tool:
                choice["message"]["tool_calls"] = self.call()
                choice["finish_reason"] = "tool_calls"
        payload = json.dumps(self.frame(self.kind, choices=[choice], usage=self.usage())).encode()
        self.handler.send_header("Content-Length", str(len(payload)))
        self.handler.end_headers()
        self.handler.wfile.write(payload)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--mode", default="")
    args, _ = parser.parse_known_args()  # accepts any flag of mlx_lm.server
    plan = claimed(parse(args.mode, Plan()), Plan())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s - %(levelname)s - %(message)s")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if plan.sigterm == "ignore":
        signal(SIGTERM, SIG_IGN)
    if plan.load == "exit":
        die(plan)
    if not plan.fail:
        say(plan)
    server = Server(args, plan)
    warnings.warn(
        "mlx_lm.server is not recommended for production as it only implements basic security checks.", stacklevel=1
    )
    LOG.info("Starting httpd at %s on port %s...", args.host, args.port)
    server.serve_forever()


if __name__ == "__main__":
    main()
