"""A limit on the memory of a backend, and of each process after it (of Linux); and the tokens that reach it.

The processes limit themselves when their interpreter starts, so that the gateway has seen the limit when memory runs
out. One malloc arena: each thread would reserve an address space of its own, which the limit is on.
"""

from pathlib import Path

import psutil
from tokenizers import Tokenizer

from tests.integration.harness import Gateway
from tests.integration.wire import Json

AT_START = """
import resource
from pathlib import Path

limit = Path(__file__).with_name("limit")
if limit.exists():
    resource.setrlimit(resource.RLIMIT_AS, (int(limit.read_text()),) * 2)
"""


class MemoryLimit:
    """``env``: for the model in the config."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(AT_START)
        self.env = {"PYTHONPATH": str(folder), "MALLOC_ARENA_MAX": "1"}

    def apply(self, gateway: Gateway, names: list[str], room: int) -> None:
        """Restarts them. ``room``: bytes beyond what the largest of them uses."""
        backends = {name: gateway.backend(name) for name in names}
        limit = max(psutil.Process(one["pid"]).memory_info().vms for one in backends.values()) + room
        (self._folder / "limit").write_text(str(limit))
        for name, before in backends.items():
            assert gateway.http.post(f"/api/backends/{name}/restart").status_code == 202
            gateway.await_life(name, before["pid"])


def tokens_of(model: Path, body: Json) -> int:
    """Tokens of the message, without the template."""
    return len(Tokenizer.from_file(str(model / "tokenizer.json")).encode(body["messages"][0]["content"]))
