"""Runs mlx_lm.server in this interpreter, with unchanged arguments, and tells what goes on in it.

    python -P instrument.py server --model …        in place of        python -P -m mlx_lm server --model …

Self-contained: standard library and mlx only, no import of the gateway's packages, which the server's environment may
not have. Written for mlx-lm 0.31.3 to 0.32.2; what another version lacks is told as null.

One end of a socket pair is inherited, its descriptor number in MLX_GATEWAY_CHANNEL. JSON lines go both ways:

    out   {"active": …, "pooled": …, "peak": …, "working_set": …, "generating": …, "reading": …, "decoding": …,
           "longest": …, "cached_sequences": …, "cached_bytes": …, "fixes": {…}}      bytes and tokens; null = not known
    in    {"do": "release_pool"}
          {"do": "limits", "cache": BYTES, "memory": BYTES}                           either may be left out
          {"do": "prompt_cache", "bytes": BYTES, "entries": N}                        likewise

A report goes out at once when the members of the batch change or the generation thread ends, twice a second while
anything changes, every ``IDLE`` seconds otherwise.

Nothing here may harm the server. What fails costs one line on stderr, which begins with ``PREFIX``; a socket that is
full loses reports; when the other end is closed, this end goes quiet.

Caveats:

* Arrays belong to the stream of the generation thread, so batch and prompt cache are read and changed on that thread
  only: ``Hooks`` notes plain numbers there, and the thread that reports reads these.
* mlx's allocator has a lock of its own: its figures, limits and pool are used from any thread.
* The process must end as if this file were not there: its threads are daemons, no signal handler is set, and what the
  server raises passes through.
"""

import functools
import hashlib
import importlib
import inspect
import json
import os
import runpy
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CHANNEL = "MLX_GATEWAY_CHANNEL"  # number of the descriptor
ENGINE_FIXES = "MLX_GATEWAY_ENGINE_FIXES"  # "off": none is applied
PREFIX = "mlx-gateway instrument: "  # of a line on stderr; the gateway's log parser takes such a line for no failure

BUSY = 0.5  # seconds between two looks while something changes
IDLE = 4.0  # seconds between two looks, and reports, when nothing has changed for a while
GAP = 0.05  # seconds between two reports, however much changes
MAX_COMMAND = 4096  # bytes of a line that comes in
MAX_JOBS = 8  # that wait for the generation thread


def say(text: str) -> None:
    """One line on stderr."""
    try:
        sys.stderr.write(f"{PREFIX}{text}\n")
        sys.stderr.flush()
    except Exception:  # there may be no stderr
        return


def failed(what: str, error: BaseException) -> None:
    """``error`` by its place, not by its text, which may be of any length and kind."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    line = place.tb_lineno if place is not None else 0
    say(f"{what}: {type(error).__name__} in line {line}; the server goes on")


def guarded(what: str, body: Callable[[], None]) -> None:
    try:
        body()
    except Exception as error:
        failed(what, error)


# -- engine fixes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fix:
    """A function of the engine that is replaced. ``module`` and ``name``: where it is (``Class.method``). ``sources``:
    ``digest`` of each source that may be replaced. ``replace``: from the original to the replacement."""

    title: str
    module: str
    name: str
    sources: frozenset[str]
    replace: Callable[[Any], Any]


FIXES: tuple[Fix, ...] = ()


def digest(function: Any) -> str:
    """Of the source of a function."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


def apply_fixes(fixes: tuple[Fix, ...], *, wanted: bool) -> dict[str, str]:
    """Name of each fix → ``on``, ``off`` or ``source differs``: then nothing is replaced."""
    return {fix.title: _apply(fix) if wanted else "off" for fix in fixes}


def _apply(fix: Fix) -> str:
    try:
        owner: Any = importlib.import_module(fix.module)
        *path, last = fix.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original = getattr(owner, last)
        if digest(original) not in fix.sources:
            return "source differs"
        setattr(owner, last, fix.replace(original))
    except Exception as error:
        failed(f"engine fix {fix.title!r} not applied", error)
        return "source differs"
    return "on"


# -- what is noted on the generation thread ----------------------------------------------------------------------------


@dataclass
class Noted:
    """Plain numbers, each written by one thread. ``None``: not known."""

    generating: bool | None = None
    reading: int | None = None
    decoding: int | None = None
    longest: int | None = None  # tokens of the longest member, with all of its prompt
    cached_sequences: int | None = None
    cached_bytes: int | None = None


class Hooks:
    """Notes what the engine does, directly after its own methods. ``changed`` is called when something happened that
    is to be told at once."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.noted = Noted()
        self._changed = changed
        self._measure = True  # ``longest`` at the next step: it costs a little, so not at each
        self._generator: Any = None  # the ResponseGenerator
        self._jobs: list[Callable[[], None]] = []  # for the generation thread
        self._takes_jobs = False
        self._members = (0, 0)

    def install(self, server: Any) -> None:
        """``server``: the module mlx_lm.server. What it lacks is not hooked."""
        noted = self.noted
        after(server, "ResponseGenerator", ("__init__",), self._created)
        if after(server, "BatchGenerator", ("insert_segments", "next", "remove"), self._note_batch):
            noted.reading = noted.decoding = noted.longest = 0
            self._around_single(server)
        if after(server, "LRUPromptCache", ("insert_cache", "trim_to"), self._note_cache):
            noted.cached_sequences = noted.cached_bytes = 0
        self._takes_jobs = after(server, "ResponseGenerator", ("_next_request",), self._run_jobs)

    def measure(self) -> None:
        """The next step measures the longest member."""
        self._measure = True

    @property
    def busy(self) -> bool:
        return bool(self.noted.reading or self.noted.decoding)

    # -- the generation thread --

    def _created(self, generator: Any) -> None:
        self._generator = generator
        self.noted.generating = True
        start("watch", functools.partial(self._until_it_ends, generator._generation_thread))

    def _until_it_ends(self, thread: threading.Thread) -> None:
        thread.join()
        if not self._generator._stop:  # else the server was asked to stop
            self.noted.generating = False
            self._changed()

    # -- on the generation thread --

    def _note_batch(self, batch: Any) -> None:
        prompts, answers, waiting = batch._prompt_batch, batch._generation_batch, batch._unprocessed_sequences
        members = (len(prompts) + len(waiting), len(answers))
        if members != self._members or self._measure:
            self._measure = False
            self.noted.longest = max(_lengths(prompts, answers, waiting, batch._currently_processing), default=0)
        if members != self._members:
            self._members = self.noted.reading, self.noted.decoding = members
            self._changed()

    def _around_single(self, server: Any) -> None:
        """A request that is served alone, beside no batch, comes from this function."""
        original = getattr(server, "stream_generate", None)
        if original is None:
            return

        @functools.wraps(original)
        def noting(*args: Any, **kwargs: Any) -> Iterator[Any]:
            length = _prompt_length(kwargs)
            self._note_single((1, 0), length)
            try:
                for count, answer in enumerate(original(*args, **kwargs), 1):
                    if count == 1:
                        self._note_single((0, 1), length)
                    self.noted.longest = length + count
                    yield answer
            finally:
                self._note_single((0, 0), 0)

        server.stream_generate = noting

    def _note_single(self, members: tuple[int, int], longest: int) -> None:
        self._members = self.noted.reading, self.noted.decoding = members
        self.noted.longest = longest
        self._changed()

    def _note_cache(self, cache: Any) -> None:
        self.noted.cached_sequences, self.noted.cached_bytes = len(cache), int(cache.nbytes)

    def _run_jobs(self, _generator: Any) -> None:
        while self._jobs:
            guarded("a command was not carried out", self._jobs.pop(0))

    # -- commands --

    def bound_prompt_cache(self, *, size: int | None, entries: int | None) -> None:
        """Raises RuntimeError where that cannot be done."""
        generator = self._generator
        if generator is None or not self._takes_jobs or len(self._jobs) >= MAX_JOBS:
            raise RuntimeError("no generation thread that would do it")
        if getattr(generator, "_is_distributed", False):
            raise RuntimeError("every rank would have to do it at the same step")

        def bound() -> None:
            cache = generator.prompt_cache
            if size is not None:
                cache.max_bytes = generator.model_provider.cli_args.prompt_cache_bytes = size
            if entries is not None:
                cache.max_size = entries
            cache.trim_to(n_bytes=size, n_sequences=entries)

        self._jobs.append(bound)


def _lengths(prompts: Any, answers: Any, waiting: Any, processing: Any) -> Iterator[int]:
    """Tokens of each member: of its prompt, cached or not, and of its answer so far."""
    for tokens in answers.tokens:
        yield len(tokens)
    for tokens, (_, done, total) in zip(prompts.tokens, processing, strict=False):
        yield len(tokens) + total - done
    for sequence in waiting:
        yield len(sequence[4]) + sum(len(segment) for segment in sequence[1])


def _prompt_length(arguments: Mapping[str, Any]) -> int:
    """Tokens of a prompt that is read alone, with those that are cached; 0 = not known."""
    try:
        offsets = (getattr(cache, "offset", 0) for cache in arguments["prompt_cache"])
        return len(arguments["prompt"]) + max((n for n in offsets if isinstance(n, int)), default=0)
    except Exception:
        return 0


def after(server: Any, name: str, methods: tuple[str, ...], note: Callable[[Any], None]) -> bool:
    """``note`` is called with the object after each call of one of these methods of a class. False: this version has
    not all of them, and none is changed."""
    owner = getattr(server, name, None)
    lacking = [method for method in methods if not hasattr(owner, method)]
    if owner is None or lacking:
        say(f"this version has no {name} with {', '.join(methods)}; what they would tell is not known")
        return False
    for method in methods:
        setattr(owner, method, _noting(getattr(owner, method), note))
    return True


def _noting(original: Any, note: Callable[[Any], None]) -> Any:
    """A note that fails is not called again."""
    works = True

    @functools.wraps(original)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal works
        result = original(self, *args, **kwargs)
        if works:
            try:
                note(self)
            except Exception as error:
                works = False
                failed(f"{original.__qualname__} is no longer watched", error)
        return result

    return noting


# -- the channel -------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """Bytes of mlx's allocator."""

    active: int
    pooled: int
    peak: int
    working_set: int | None


@functools.cache
def working_set() -> int | None:
    """The device's recommended working set; Metal tells it."""
    import mlx.core as mx

    info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    size = info.get("max_recommended_working_set_size")
    return int(size) if size else None


def memory() -> Memory:
    import mlx.core as mx

    return Memory(mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory(), working_set())


@dataclass
class Channel:
    """The end of the socket pair that the gateway has not. Never blocks."""

    sock: socket.socket
    closed: bool = False
    _rest: bytes = field(default=b"", repr=False)  # of a line that was sent in part

    def send(self, line: bytes) -> None:
        """Drops the line if there is no room for it."""
        try:
            if self._rest:
                self._rest = self._rest[self.sock.send(self._rest, socket.MSG_DONTWAIT) :]
            if not self._rest:
                self._rest = line[self.sock.send(line, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return
        except OSError:
            self.closed = True

    def lines(self) -> Iterator[bytes]:
        """Until the other end is closed, or sends what cannot be a command. Blocks."""
        part = b""
        while len(part) <= MAX_COMMAND:
            try:
                data = self.sock.recv(MAX_COMMAND)
            except OSError:
                data = b""
            if not data:
                break
            *whole, part = (part + data).split(b"\n")
            yield from whole
        self.closed = True


class Reporter:
    """Two threads: one reports, one obeys."""

    def __init__(self, channel: Channel, hooks: Hooks, news: threading.Event, fixes: Mapping[str, str]) -> None:
        self._channel = channel
        self._hooks = hooks
        self._news = news
        self._fixes = dict(fixes)

    def start(self) -> None:
        start("report", self._report)
        start("obey", self._obey)

    def _report(self) -> None:
        pause, told, told_at = BUSY, b"", 0.0
        while not self._channel.closed:
            self._news.wait(pause)
            self._news.clear()
            line, now = self._line(), time.monotonic()
            changed = line != told
            if changed or now - told_at >= IDLE - BUSY:
                self._channel.send(line)
                told, told_at = line, now
            pause = BUSY if changed or self._hooks.busy else min(2 * pause, IDLE)
            self._hooks.measure()
            time.sleep(GAP)

    def _line(self) -> bytes:
        return json.dumps({**asdict(memory()), **asdict(self._hooks.noted), "fixes": self._fixes}).encode() + b"\n"

    def _obey(self) -> None:
        for line in self._channel.lines():
            guarded("a command was not carried out", functools.partial(self._do, line))
            self._news.set()
        self._news.set()  # the channel is closed

    def _do(self, line: bytes) -> None:
        import mlx.core as mx

        command = json.loads(line)
        match command["do"]:
            case "release_pool":
                mx.clear_cache()
            case "limits":
                if (size := _size(command, "cache")) is not None:
                    mx.set_cache_limit(size)
                if (size := _size(command, "memory")) is not None:
                    mx.set_memory_limit(size)
            case "prompt_cache":
                self._hooks.bound_prompt_cache(size=_size(command, "bytes"), entries=_size(command, "entries"))
            case _:
                raise ValueError("unknown command")


def _size(command: Mapping[str, Any], name: str) -> int | None:
    value = command.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError(f"{name}: expected a number of 0 or more")
    return value


def start(name: str, body: Callable[[], None]) -> None:
    """In a daemon thread; an error ends it with one line."""
    run = functools.partial(guarded, f"thread {name!r} ended", body)
    threading.Thread(target=run, name=f"instrument-{name}", daemon=True).start()


def inherited(number: str) -> socket.socket:
    """The inherited end; programs that the server starts do not get it. Raises ValueError, OSError."""
    descriptor = int(number)
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


def instrument(server: Any, number: str, fixes: str) -> None:
    """``number``: of the descriptor, "" = no channel. ``fixes``: "off" = none."""
    applied = apply_fixes(FIXES, wanted=fixes != "off")
    if not number:
        return
    news = threading.Event()
    channel, hooks = Channel(inherited(number)), Hooks(news.set)
    hooks.install(server)
    Reporter(channel, hooks, news, applied).start()


def main() -> None:
    number, fixes = os.environ.pop(CHANNEL, ""), os.environ.pop(ENGINE_FIXES, "")  # not for the server's own children
    server = importlib.import_module("mlx_lm.server")  # an error here is the server's own
    guarded("not started", lambda: instrument(server, number, fixes))
    runpy.run_module("mlx_lm", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
