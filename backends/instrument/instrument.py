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

import contextlib
import ctypes
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


VALUE = "__value__"  # the key of an entry in a node of the engine's trie; all others are tokens
ENTRIES = "mlx_gateway_entries"  # an attribute of the engine's trie
ADMISSION_BUDGET = 0.05  # seconds that the engine generates before it looks for requests and cancellations again
THINKING_TAIL = 11  # tokens at the end of a prompt in which the engine looks for the opening of a thought


def linear_search(original: Any) -> Any:
    """Beside a cached conversation of n tokens, the search for the nearest longer entry copies n²/2 tokens, at each new
    prompt and on the thread that generates. Here the path is one list, copied where it is a better match."""
    result = original.__globals__["PromptTrieResult"]

    @functools.wraps(original)
    def search(self: Any, model: Any, tokens: Any) -> Any:
        node = self._trie.get(model)
        if node is None:
            return result(model, None, None, None, 0)
        if not tokens and VALUE in node:
            return result(model, [], None, None, 0)
        last, index = -1, 0
        while index < len(tokens) and tokens[index] in node:
            node = node[tokens[index]]
            if VALUE in node:
                last = index
            index += 1
        if last == len(tokens) - 1 >= 0:
            return result(model, tokens, None, None, 0)
        shorter = tokens[: last + 1] if last > 0 else None  # not an entry of one token, as in the original
        longer = None
        if index > 0:
            longer = nearest_listed(getattr(self, ENTRIES, None), model, tokens[:index])
        if index > 0 and longer is None:
            below = nearest_below(node)
            longer = None if below is None else tokens[:index] + below
        return result(model, None, shorter, longer, index)

    return search


def lists_entries(original: Any) -> Any:
    """Gives the trie the list of its entries, which the prompt cache has for evictions: to go through ten or a hundred
    entries takes a hundredth of the time of a walk down one of 20 000 tokens."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        setattr(self._trie, ENTRIES, self._lru)

    return init


def nearest_listed(entries: Any, model: Any, head: Any) -> Any:
    """The shortest entry that begins with ``head``. None = there is none, or several: then the order in the trie
    counts."""
    best, several, few = None, False, head[:16]
    for queue in () if entries is None else entries._lrus.values():
        for owner, entry in queue:
            if owner != model or len(entry) < len(head) or (best is not None and len(entry) > len(best)):
                continue
            if entry[: len(few)] == few and entry[: len(head)] == head:
                several = best is not None and len(entry) == len(best)
                best = entry
    return None if several else best


def nearest_below(node: Mapping[Any, Any]) -> list[Any] | None:
    """Path from ``node`` to the nearest entry at or below it, in the order of the original: the child that was inserted
    last first, and of equally near entries the first. None = there is none."""
    best: list[Any] | None = None
    path: list[Any] = []
    stack: list[tuple[Mapping[Any, Any], int, Any]] = [(node, 0, None)]
    while stack:
        node, depth, token = stack.pop()
        if depth:
            path[depth - 1 :] = [token]
        # Down the rest of one prompt, as most nodes are; what is not nearer than the best one does not matter.
        for _ in range(len(path), sys.maxsize if best is None else len(best)):
            if len(node) != 1 or VALUE in node:
                break
            (token,) = node
            path.append(token)
            node = node[token]
        else:
            continue
        if VALUE in node:
            best = path[:]
        else:
            stack.extend((child, len(path) + 1, token) for token, child in node.items())
    return best


def leaves_a_token(original: Any) -> Any:
    """A prompt that is cached whole leaves nothing to read, which ends the generation thread ("empty prompt"). Here the
    prompt without its last token is looked for instead, and the rest is read."""

    @functools.wraps(original)
    def fetch_nearest_cache(self: Any, model: Any, tokens: Any) -> Any:
        cache, rest = original(self, model, tokens)
        if rest or not tokens:
            return cache, rest
        cache, rest = original(self, model, tokens[:-1])
        return cache, [*rest, tokens[-1]]

    return fetch_nearest_cache


def evaluates_entries(original: Any) -> Any:
    """An entry is a lazy slice that holds the buffers of the batch it was cut from until it is evaluated, and those of
    a recurrent layer even then. Here it is evaluated into arrays of its own, once it is stored and what it replaces is
    gone."""

    @functools.wraps(original)
    def insert_cache(self: Any, model: Any, tokens: Any, prompt_cache: Any, **options: Any) -> None:
        original(self, model, tokens, prompt_cache, **options)
        if _is_stored(self, model, tokens):
            guarded("a cached prompt was not evaluated", lambda: evaluate(prompt_cache))

    return insert_cache


def _is_stored(cache: Any, model: Any, tokens: Any) -> bool:
    """False: there was no room for it."""
    try:
        return cache._trie.get(model, tokens) is not None
    except KeyError:
        return False


def evaluate(caches: Any) -> None:
    """Gives each array of ``caches`` a buffer of its own, if its own is larger than it needs, and computes it."""
    import mlx.core as mx

    found: list[Any] = []

    def own(value: Any) -> Any:
        if isinstance(value, mx.array):
            found.append(mx.contiguous(value))  # a copy only where the buffer is larger: mlx looks at that
            return found[-1]
        if type(value) in (list, tuple):
            return type(value)(map(own, value))
        if hasattr(value, "is_trimmable"):  # a cache
            vars(value).update({name: own(part) for name, part in vars(value).items()})
        return value

    own(caches)
    mx.eval(found)


def looks_often(original: Any) -> Any:
    """Beside anything that generates, a new request and a cancellation are seen every 0.5 s. Ranks of a distributed
    model count steps instead, in agreement: they are left alone."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not (args or kwargs or self._is_distributed):
            self._budget = ADMISSION_BUDGET

    return init


def cuts_tool_turns(original: Any) -> Any:
    """A cache that cannot be trimmed is found again only at its end, and the thought that a template opens at the end
    of a prompt is not in the next one. The engine stores the prompt without it after a user's message; here also after
    a tool's. Returns what the original does: prompt, segments, their types, and what this version adds."""

    @functools.wraps(original)
    def tokenize(self: Any, tokenizer: Any, request: Any, args: Any) -> Any:
        prompt, segments, types, *more = original(self, tokenizer, request, args)
        whole = len(segments) == 1 and types == ["assistant"] and more[1:] in ([], [None])  # and no images
        if whole and _ends_in_tool(request) and tokenizer.has_chat_template and tokenizer.has_thinking:
            cut = tokenizer.rfind_think_start(prompt, start=len(prompt) - THINKING_TAIL)
            if cut > 0 and not _can_be_trimmed(original, self.model_provider.model, len(prompt)):
                segments, types = [prompt[:cut], prompt[cut:]], ["user", "assistant"]
        return prompt, segments, types, *more

    return tokenize


def _ends_in_tool(request: Any) -> bool:
    return request.request_type == "chat" and bool(request.messages) and request.messages[-1]["role"] == "tool"


def _can_be_trimmed(original: Any, model: Any, length: int) -> bool:
    """Whether its cache can be once it holds so many tokens; a window, until it is full."""
    caches = original.__globals__["make_prompt_cache"](model)
    return all(cache.is_trimmable() and length < _window(cache) for cache in caches)


def _window(cache: Any) -> float:
    """Tokens of the smallest window; infinite where there is none."""
    parts = [_window(part) for part in getattr(cache, "caches", ())]
    return min([*parts, getattr(cache, "max_size", None) or float("inf")])


CACHE, SERVER = "mlx_lm.models.cache", "mlx_lm.server"
# the digests are those of mlx-lm 0.31.3 to 0.32.2
INIT = {"dad40f4ef6ae45a0"}
SEARCH, FETCH, INSERT = {"1748a78c55ada724"}, {"7ac872d0c1091796"}, {"49c194f3fcf8831e"}
BUDGET, TOKENIZE = {"553a4645a8c84e38"}, {"e69a2e4ca2e922e8", "85879c0b95a42782"}  # of the latter: from 0.32.1 on
FIXES = (
    Fix("prompt_search", CACHE, "PromptTrie.search", frozenset(SEARCH), linear_search),
    Fix("prompt_list", CACHE, "LRUPromptCache.__init__", frozenset(INIT), lists_entries),
    Fix("exact_hit", CACHE, "LRUPromptCache.fetch_nearest_cache", frozenset(FETCH), leaves_a_token),
    Fix("stored_entries", CACHE, "LRUPromptCache.insert_cache", frozenset(INSERT), evaluates_entries),
    Fix("admission_budget", SERVER, "TimeBudget.__init__", frozenset(BUDGET), looks_often),
    Fix("tool_turns", SERVER, "ResponseGenerator._tokenize", frozenset(TOKENIZE), cuts_tool_turns),
)


def digest(function: Any) -> str:
    """Of the source of a function, or of that source itself."""
    source = function if isinstance(function, str) else inspect.getsource(function)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


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
            say(f"engine fix {fix.title!r} not applied: the source of {fix.name} is another one")
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

    try:
        info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
        size = info.get("max_recommended_working_set_size")
        return int(size) if size else None
    except Exception as error:
        failed("the recommended working set is not known", error)
        return None


def release_pool() -> None:
    """mlx's freed buffers, back to the system: on the CPU they go to malloc first, whose glibc keeps most of them."""
    import mlx.core as mx

    mx.clear_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)


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

    def close(self) -> None:
        """Both sides notice."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

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
        self.close()


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
        try:
            self._report_changes()
        finally:  # the gateway must not take the last report for the present
            self._channel.close()

    def _report_changes(self) -> None:
        pause, told, told_at = 0.0, b"", 0.0
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
                release_pool()
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
