"""The config, key by key: what each may be, its default and what it does. Pure.

The one source for the reader's checks, the defaults and the JSON Schema. A default stands here as the value that the
program works with (seconds, bytes); ``json_schema`` shows it as such.
"""

from backends.domain.spec import RestartPolicy, Timeouts
from gateway.config import parsers
from gateway.config.field_types import Field, Json, ListOf, MapOf, Section, ServerArgs
from gateway.config.validators import BOOLEAN, budget, choice, duration, number, size, text
from gateway.request import ALLOWABLE

_TIMEOUTS = Timeouts()
_RESTART = RestartPolicy()

_OPTIONAL_TIME = duration("0", "720h")
_TIME = duration("1ms", "720h")
_NAME = text(parsers.model_name, "a name")

SERVER = Section(
    (
        Field("host", text(parsers.host, "an address"), "127.0.0.1", "Where to listen."),
        Field("port", number(0, 65535), 8080, "The port to listen on; 0 = a free one, which is printed."),
        Field(
            "api_keys",
            ListOf(text(parsers.header_secret, "a key", is_secret=True), what="a list of keys"),
            (),
            "Keys of which a client has to send one (Bearer or x-api-key). Required when host is not loopback.",
        ),
        Field(
            "cors_origins",
            ListOf(text(parsers.cors_origin, "an origin"), what="a list of origins"),
            (),
            'Web pages that may call: exact origins, or ["*"].',
        ),
        Field("max_body", size("1KiB", "1TiB"), 32 * 2**20, "The largest request taken."),
        Field("max_connections", number(1, 1_000_000), 2048, "Beyond it: 503 overloaded."),
        Field("drain_timeout", _OPTIONAL_TIME, 30.0, "How long a stop waits for requests in flight."),
        Field("keepalive", _OPTIONAL_TIME, 15.0, "An SSE comment when nothing else was sent for so long; 0 = off."),
        Field("expose_backend_output", BOOLEAN, True, "Put the matched line of backend output into error objects."),
    )
)

MEMORY = Section(
    (
        Field(
            "budget",
            budget("1B", "1024TiB"),
            "auto",
            "Memory for all models: auto (what the machine can give now), a share like 80%, or a size.",
        ),
    )
)

TIMEOUTS = Section(
    (
        Field("start", _TIME, _TIMEOUTS.start, "From the launch to the first proven token."),
        Field("progress", _TIME, _TIMEOUTS.progress, "The longest silence while requests are in flight."),
        Field("total", _OPTIONAL_TIME, _TIMEOUTS.total, "One request with all its attempts; 0 = no limit."),
        Field("stop", _OPTIONAL_TIME, _TIMEOUTS.stop, "From SIGTERM to SIGKILL."),
    )
)

RESTART = Section(
    (
        Field("min_backoff", _TIME, _RESTART.min_backoff, "The first wait before a restart; it doubles."),
        Field("max_backoff", _TIME, _RESTART.max_backoff, "The longest wait before a restart."),
        Field("max_failures", number(1, 10_000), _RESTART.max_failures, "So many within window, and it gives up."),
        Field("window", _TIME, _RESTART.window, "The time in which failures are counted."),
    )
)

_RULES = MapOf(Json(), parsers.request_field, "a mapping of request fields")

REQUEST = Section(
    (
        Field("defaults", _RULES, {}, "Fields for requests that lack them, as in {temperature: 0.7}."),
        Field("force", _RULES, {}, "Fields set in every request, whatever the client sent."),
        Field("drop", ListOf(text(parsers.droppable_field, "a field")), (), "Fields taken out of every request."),
        Field("allow", ListOf(choice(*ALLOWABLE)), (), "What clients may do that is refused or ignored otherwise."),
    )
)

DISTRIBUTED = Section(
    (
        Field("hostfile", text(parsers.some_text), None, "The hosts, as mlx.launch takes them."),
        Field("backend", choice("ring", "jaccl", "nccl", "mpi"), "ring", "How the processes talk."),
        Field("mode", choice("tensor", "pipeline"), "tensor", "How the model is split."),
        Field("processes", number(1, 64), None, "So many processes on this machine, instead of a hostfile."),
    )
)

MODEL = Section(
    (
        Field(
            "model",
            text(parsers.some_text),
            None,
            "Hub name or local folder for mlx_lm.server; with command or urls the name used upstream.",
        ),
        Field(
            "command",
            ListOf(text(), 1, "a list of texts"),  # an argument may well be empty
            (),
            "A server of your own instead of mlx_lm.server: program and arguments, with {port}, {host}, {model}.",
        ),
        Field(
            "urls",
            ListOf(text(parsers.url, "a URL"), 1, "a list of URLs"),
            (),
            "Servers or gateways that already run: one replica each, not supervised.",
        ),
        Field("api_key", text(parsers.sendable_key, "a key", is_secret=True), "", "The key for the servers in urls."),
        Field("aliases", ListOf(_NAME, what="a list of names"), (), "Other names for this model."),
        Field("replicas", number(1, 64), 1, "How many processes."),
        Field(
            "load",
            choice("eager", "on_demand"),
            "eager",
            "When to load: eager = at the start, and it stays; on_demand = with the first request.",
        ),
        Field(
            "idle_unload",
            _OPTIONAL_TIME,
            0.0,
            "Unload after so long without requests; 0 = never.",
        ),
        Field("max_inflight", number(1, 1_000_000), 8, "Requests at a time, for each replica."),
        Field("max_queue", number(0, 1_000_000), 64, "Requests that may wait for the model; beyond it 503 overloaded."),
        Field("queue_timeout", _OPTIONAL_TIME, 60.0, "How long a request may wait."),
        Field(
            "max_context",
            number(1),
            None,
            "Tokens; longer requests are refused before a backend is touched.",
            nullable=True,
        ),
        Field("server_args", ServerArgs(), {}, "Flags of mlx_lm.server, with or without --; null = not passed."),
        Field(
            "env", MapOf(text(), parsers.variable_name, "a mapping of variables"), {}, "Environment variables added."
        ),
        Field(
            "fallbacks",
            ListOf(_NAME, what="a list of names"),
            (),
            "Other models of this file, tried in order when no replica can answer.",
        ),
        Field("request", REQUEST, None, "What to change in requests."),
        Field(
            "memory",
            size("1B", "1024TiB"),
            None,
            "Memory that one replica needs, instead of the estimate; beyond it, it is begun anew between requests.",
            nullable=True,
        ),
        Field("resume", choice("auto", "off"), "auto", "Go on in mid-answer on another replica, where proven safe."),
        Field("timeouts", TIMEOUTS, None, "Deadlines."),
        Field("restart", RESTART, None, "Restarts after failures."),
        Field(
            "distributed",
            DISTRIBUTED,
            None,
            "One model over several processes or machines, run by mlx.launch.",
            nullable=True,
            unsupported="remove it: run the model on one machine",
        ),
    )
)

# What each model says for itself, and nobody for all.
OWN_KEYS = ("model", "command", "urls", "aliases")
DEFAULTS = Section(tuple(field for field in MODEL.fields if field.key not in OWN_KEYS))

TOP = Section(
    (
        Field("server", SERVER, None, "How the gateway listens."),
        Field("memory", MEMORY, None, "Memory for models."),
        Field("defaults", DEFAULTS, None, "Any key of a model but its names and its source; a model's own value wins."),
        Field("models", MapOf(MODEL, parsers.model_name, "a mapping of models"), None, "The models, by public name."),
    )
)


def places() -> dict[str, str]:
    """Key → where it goes, for keys found in the wrong place. The outermost place wins."""
    found: dict[str, str] = {}
    queue: list[tuple[str, Section]] = [("", TOP), ("models.NAME", MODEL)]
    while queue:
        where, section = queue.pop(0)
        for field in section.fields:
            found.setdefault(field.key, where)
            if isinstance(field.kind, Section) and field.key != "defaults":
                queue.append((f"{where}.{field.key}".lstrip("."), field.kind))
    return found
