"""mlx_lm.server, whose generation thread pauses while the file named by ``PAUSE`` is there. Its content says how:

    sleep    it does nothing, as in a deadlock of the GPU
    search   it computes, and sends nothing, as while it searches the prompt cache for a new prompt

The arguments are those of mlx_lm.server.
"""

import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

SERVER: Any = import_module("mlx_lm.server")
ENGINE: Any = import_module("mlx_lm.generate").BatchGenerator
PAUSE = Path(os.environ["PAUSE"])

_next = ENGINE.next


def _how() -> str:
    try:
        return PAUSE.read_text()
    except FileNotFoundError:
        return ""


def paused_next(self: Any, *args: Any, **kwargs: Any) -> Any:
    while (how := _how()) in ("sleep", "search"):
        if how == "sleep":
            time.sleep(0.5)
    return _next(self, *args, **kwargs)


if __name__ == "__main__":
    ENGINE.next = paused_next
    SERVER.main()
