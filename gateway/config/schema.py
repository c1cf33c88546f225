"""The table of config keys: the type of each, its default and its description. Pure.

Conversion, defaults and JSON Schema have this one source. Defaults are the values that the program works with (seconds,
bytes); ``json_schema`` shows them as they are.
"""

from backends.domain.spec import RestartPolicy, Timeouts
from gateway.config import parsers
from gateway.config.field_types import Field, Json, ListOf, MapOf, Section, ServerArgs
from gateway.config.validators import BOOLEAN, budget, choice, duration, number, number_or, size, text
from gateway.request import ALLOWABLE

_TIMEOUTS = Timeouts()
_RESTART = RestartPolicy()

_OPTIONAL_TIME = duration("0", "720h")
_TIME = duration("1ms", "720h")
_NAMES = ListOf(text(parsers.model_name, "a name"), what="a list of names")

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
        Field(
            "allowed_hosts",
            ListOf(text(parsers.allowed_host, "a name"), what="a list of names"),
            (),
            "Names beside localhost that the Host header may carry. Without api_keys, others are refused (421).",
        ),
        Field("max_body", size("1KiB", "1TiB"), 32 * 2**20, "The largest request body."),
        Field(
            "body_memory",
            size("1MiB", "1TiB"),
            512 * 2**20,
            "Memory for the bodies of all requests, until they are answered; beyond it 503 overloaded.",
        ),
        Field("max_connections", number(1, 1_000_000), 2048, "Requests at a time; beyond it 503 overloaded."),
        Field("drain_timeout", _OPTIONAL_TIME, 30.0, "The longest time that a stop waits for requests in flight."),
        Field("keepalive", _OPTIONAL_TIME, 15.0, "Silence after which an SSE comment is sent; 0 = off."),
        Field("expose_backend_output", BOOLEAN, True, "Whether error objects hold the matched line of backend output."),
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
        Field("start", _TIME, _TIMEOUTS.start, "The longest time from the launch to the first proven token."),
        Field(
            "progress",
            _TIME,
            _TIMEOUTS.progress,
            "The longest silence of a backend with requests in flight; the rhythm of its model may set a shorter one.",
        ),
        Field("total", _OPTIONAL_TIME, _TIMEOUTS.total, "The longest time of a request, all attempts; 0 = no limit."),
        Field("stop", _OPTIONAL_TIME, _TIMEOUTS.stop, "The time between SIGTERM and SIGKILL."),
    )
)

RESTART = Section(
    (
        Field(
            "min_backoff",
            _TIME,
            _RESTART.min_backoff,
            "The wait before a restart; doubled by each process that never answered.",
        ),
        Field("max_backoff", _TIME, _RESTART.max_backoff, "The longest wait before a restart."),
        Field(
            "max_failures",
            number(1, 10_000),
            _RESTART.max_failures,
            "Processes that never answered before it is crash looping, or given up.",
        ),
        Field("window", _TIME, _RESTART.window, "The time in which they are counted."),
    )
)

_RULES = MapOf(Json(), parsers.request_field, "a mapping of request fields")

REQUEST = Section(
    (
        Field("defaults", _RULES, {}, "Fields for requests that lack them, as in {temperature: 0.7}."),
        Field("force", _RULES, {}, "Fields set in every request; they replace the client's."),
        Field("drop", ListOf(text(parsers.droppable_field, "a field")), (), "Fields removed from every request."),
        Field("allow", ListOf(choice(*ALLOWABLE)), (), "Features that are refused or ignored unless listed here."),
    )
)

DISTRIBUTED = Section(
    (
        Field("hostfile", text(parsers.some_text), None, "The hosts, as mlx.launch takes them."),
        Field("backend", choice("ring", "jaccl", "nccl", "mpi"), "ring", "The communication backend of mlx.launch."),
        Field("mode", choice("tensor", "pipeline"), "tensor", "How the model is split."),
        Field("processes", number(1, 64), None, "The number of processes on this machine, instead of a hostfile."),
    )
)

MODEL = Section(
    (
        Field(
            "model",
            text(parsers.some_text),
            None,
            "Hub name or local folder for mlx_lm.server; with command or urls the model name sent upstream.",
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
        Field(
            "proxy",
            text(parsers.proxy, "auto, direct or the URL of a proxy", is_secret=True),
            "auto",
            "The way to the servers in urls: auto = the proxy of the environment, but none for hosts of the own "
            "network; direct = none; or the URL of a proxy.",
        ),
        Field("aliases", _NAMES, (), "Other names for this model."),
        Field("replicas", number(1, 64), 1, "The number of processes."),
        Field(
            "load",
            choice("eager", "on_demand"),
            "eager",
            "eager = load at the start and never unload for other models; on_demand = load with the first request.",
        ),
        Field(
            "idle_unload", _OPTIONAL_TIME, 0.0, "Time without requests for the model before it is unloaded; 0 = never."
        ),
        Field(
            "max_inflight",
            number_or("auto", 1, 1_000_000),
            "auto",
            "Requests at a time, for each replica: a number, or auto = as many as fit its memory together, and at most "
            "what mlx_lm.server decodes together (--decode-concurrency, 32); 8 where the memory is not known.",
        ),
        Field(
            "priority",
            choice("interactive", "agent", "background"),
            "interactive",
            "The class of its requests, the more urgent first: interactive, agent, background. A client may lower it "
            "by the header x-priority.",
        ),
        Field(
            "admission",
            choice("auto", "off"),
            "auto",
            "auto = as many requests at a time as fit the memory of the replica together, as far as that is known; "
            "off = max_inflight alone.",
        ),
        Field("max_queue", number(0, 1_000_000), 64, "Requests that may wait for the model; beyond it 503 overloaded."),
        Field("queue_timeout", _OPTIONAL_TIME, 60.0, "The longest wait of a request, also for a restart."),
        Field(
            "max_context",
            number(1),
            None,
            "The most tokens of a request, prompt and answer; without it prompts are held to max_position_embeddings.",
            nullable=True,
        ),
        Field("server_args", ServerArgs(), {}, "Flags of mlx_lm.server, with or without --; null = not passed."),
        Field(
            "env", MapOf(text(), parsers.variable_name, "a mapping of variables"), {}, "Environment variables to add."
        ),
        Field("fallbacks", _NAMES, (), "Other models of this file, tried in order when no replica can answer."),
        Field("request", REQUEST, None, "Changes to requests."),
        Field(
            "memory",
            size("1B", "1024TiB"),
            None,
            "Memory of one replica, instead of the estimate; a replica beyond it is restarted between requests.",
            nullable=True,
        ),
        Field("resume", choice("auto", "off"), "auto", "Continue a broken answer where proven safe."),
        Field(
            "instrument",
            choice("auto", "off"),
            "auto",
            "auto = mlx_lm.server runs under the instrument, which reports its memory, its batch and the death of its "
            "generation thread from inside its process; off = it is started as it is.",
        ),
        Field(
            "engine_fixes",
            choice("auto", "off"),
            "auto",
            "auto = the instrument replaces functions of mlx-lm that are slow or end the server, where their source is "
            "known; off = none.",
        ),
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

# Keys that ``defaults:`` may not hold.
OWN_KEYS = ("model", "command", "urls", "aliases")
DEFAULTS = Section(tuple(field for field in MODEL.fields if field.key not in OWN_KEYS))

TOP = Section(
    (
        Field("server", SERVER, None, "How the gateway listens."),
        Field("memory", MEMORY, None, "Memory for models."),
        Field("defaults", DEFAULTS, None, "Keys of all models but source and aliases; a model's own value wins."),
        Field("models", MapOf(MODEL, parsers.model_name, "a mapping of models"), None, "The models, by public name."),
    )
)


def places() -> dict[str, str]:
    """Key → the path of the section it belongs to, for keys in the wrong section. The outermost section wins."""
    found: dict[str, str] = {}
    queue: list[tuple[str, Section]] = [("", TOP), ("models.NAME", MODEL)]
    while queue:
        where, section = queue.pop(0)
        for field in section.fields:
            found.setdefault(field.key, where)
            if isinstance(field.kind, Section) and field.key != "defaults":
                queue.append((f"{where}.{field.key}".lstrip("."), field.kind))
    return found
