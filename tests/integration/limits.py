"""A limit on the memory of a backend, and of each process after it. Of Linux.

The first process is limited while it runs, to what it uses and some room; later ones limit themselves when their
interpreter starts. One malloc arena: each thread would reserve an address space of its own, which the limit is on.
"""

import resource
import sys
from pathlib import Path

import psutil

from tests.integration.harness import Gateway

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
        """``room``: bytes beyond what the largest of them uses."""
        assert sys.platform == "linux"
        pids = [gateway.backend(name)["pid"] for name in names]
        limit = max(psutil.Process(pid).memory_info().vms for pid in pids) + room
        (self._folder / "limit").write_text(str(limit))
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
