"""The command line. Each command imports the modules that it needs: ``--help`` must not load a web server."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8080"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 ok, 1 failed while running, 2 wrong usage or wrong config."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has exited: `mlx-gateway logs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-gateway",
        description="One OpenAI-compatible endpoint over several supervised mlx_lm.server processes.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the gateway")
    _config(serve)
    serve.add_argument("--host", help="overrides server.host")
    serve.add_argument("--port", type=_port, help="overrides server.port; 0 = a free port, which is printed")
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check", help="validate a config, and report all problems at once")
    _config(check)
    check.set_defaults(run=_check)

    demo = commands.add_parser("demo", help="serve a tiny model, generated locally, with two replicas; no download")
    demo.add_argument("--host", help="default 127.0.0.1")
    demo.add_argument("--port", type=_port, help="default 8080; 0 = a free port, which is printed")
    demo.set_defaults(run=_demo)

    status = commands.add_parser("status", help="the state of a running gateway")
    _url(status)
    status.add_argument("--watch", action="store_true", help="refresh every second")
    status.set_defaults(run=_status)

    logs = commands.add_parser("logs", help="the output of the backends")
    logs.add_argument("backend", nargs="?", metavar="BACKEND", help="NAME:INDEX; default: all backends")
    logs.add_argument("--follow", "-f", action="store_true", help="keep printing new lines")
    logs.add_argument("--lines", "-n", type=int, default=100, help="number of past lines to print (default 100)")
    _url(logs)
    logs.set_defaults(run=_logs)

    explain = commands.add_parser("explain", help="diagnose the output of a backend: the cause of its failure")
    explain.add_argument("file", nargs="?", default="-", metavar="FILE", help="default -: standard input")
    explain.add_argument(
        "--exit", dest="status", metavar="STATUS", help="exit status of the backend, e.g. -6, 139, SIGKILL"
    )
    explain.add_argument("--json", action="store_true")
    explain.set_defaults(run=_explain)

    schema = commands.add_parser("schema", help="JSON Schema of the config, for editors")
    schema.set_defaults(run=_schema)
    return parser


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="config.yaml", type=Path, metavar="CONFIG")


def _url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help=f"URL of the running gateway (default {DEFAULT_URL})")


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return port


def _serve(args: argparse.Namespace) -> int:
    from gateway.cli.serve import serve

    return serve(args.config, host=args.host, port=args.port)


def _check(args: argparse.Namespace) -> int:
    from gateway.cli.check import check

    return check(args.config)


def _demo(args: argparse.Namespace) -> int:
    from gateway.cli.demo import demo

    return demo(host=args.host, port=args.port)


def _status(args: argparse.Namespace) -> int:
    from gateway.cli.inspect import status

    return status(args.url, watch=args.watch)


def _logs(args: argparse.Namespace) -> int:
    from gateway.cli.inspect import logs

    return logs(args.url, args.backend, lines=args.lines, follow=args.follow)


def _explain(args: argparse.Namespace) -> int:
    from gateway.cli.explain import main as explain

    return explain(args.file, args.status, args.json, stdin=sys.stdin.buffer, stdout=sys.stdout)


def _schema(_: argparse.Namespace) -> int:
    import json

    from gateway.config import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
