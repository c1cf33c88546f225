"""``mlx-gateway demo``: a config like the shipped one, with a model generated locally, and a list of things to try."""

import sys
from dataclasses import replace
from pathlib import Path

from gateway.cli.demo_model.home import FOLDER
from gateway.cli.serve import run
from gateway.config import parse

CONFIG = f"""\
models:
  tiny:
    model: {FOLDER}
    aliases: [default]
    replicas: 2
    server_args: {{max-tokens: 256, prompt-cache-bytes: 64MB}}
    restart: {{min_backoff: 500ms}}
"""

HELP = """
mlx-gateway demo: a tiny random model with two replicas of mlx_lm.server. Its text has no meaning; the demo shows what
happens when a replica dies. In another terminal:

  {bin}/mlx-gateway status --url {url}

  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "tiny", "stream": true, "max_tokens": 200, "messages": [{{"role": "user", "content": "hello"}}]}}'

With the openai package (pip install openai):

  python3 -c 'from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  print(client.chat.completions.create(model="tiny", messages=[{{"role": "user", "content": "hello"}}]))'

Kill one replica: the other answers, and the killed one is started again:

  kill -9 $(curl -s {url}/health | python3 -c \\
    'import json, sys; print(json.load(sys.stdin)["models"]["tiny"]["backends"][0]["pid"])')
  curl -s {url}/health

Stop with Ctrl-C.
"""


def demo(*, host: str | None, port: int | None) -> int:
    config = parse(CONFIG, "demo", {})
    server = replace(config.server, host=host or "127.0.0.1", port=8080 if port is None else port)
    return run(replace(config, server=server), hint=HELP.replace("{bin}", _bin()))


def _bin() -> str:
    """The folder of the ``mlx-gateway`` command, relative to the current one where possible."""
    folder = Path(sys.executable).parent
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
