"""The generation thread of the fake, and how it and its process fail."""

import logging
import os
import sys
import time
from pathlib import Path
from queue import Queue
from threading import Event, Thread

from tests.fakes.plan import ABORT, SAYINGS, Plan

LOOK = 0.02  # seconds between two looks whether a file exists
LOG = logging.getLogger("fake_mlx")  # the name is not printed, as in mlx_lm.server


def say(plan: Plan) -> None:
    if plan.say:
        sys.stderr.write((ABORT if plan.abort else "") + SAYINGS[plan.say] + ("" if plan.say == "bars" else "\n"))
        sys.stderr.flush()


def die(plan: Plan) -> None:
    """End the process, without clean-up."""
    say(plan)
    if plan.exit < 0:
        os.kill(os.getpid(), -plan.exit)
        Event().wait()
    os._exit(plan.exit)


class Engine:
    """Starts loading at once. The thread is no daemon: the process stays alive when the port cannot be bound, as in
    mlx-lm since 0.28.4."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.loaded, self.broken = Event(), Event()
        self.answering: set[object] = set()  # answers that are being generated
        self.silent = False  # a breakdown is not reported: /health stays 200, requests wait for ever
        self.orders: Queue[str] = Queue()  # error messages with which to break down
        Thread(target=self._run_generate).start()

    @property
    def healthy(self) -> bool:
        return self.silent or not self.broken.is_set()

    def check(self, seconds: float = 0.0) -> None:
        """Wait for ``seconds``; RuntimeError, or no return at all, if generation breaks down meanwhile."""
        if self.broken.wait(seconds):
            if self.silent:
                Event().wait()
            raise RuntimeError("generation thread died")

    def wait_for(self, path: str) -> None:
        """Until it exists, unless it is empty."""
        while path and not Path(path).exists():
            self.check(LOOK)

    def break_down(self, words: str, *, silent: bool = False) -> None:
        """Break down with ``words`` as the error. Does not return to the caller."""
        self.silent = silent
        self.orders.put(words)
        self.check(60)

    def hang(self) -> None:
        """All requests wait for ever, now and later, without a line in the log."""
        self.silent = True
        self.broken.set()
        self.check()

    def _run_generate(self) -> None:
        try:
            self._load_and_serve()
        except RuntimeError as error:
            if self.silent:  # uncaught up to 0.31.3: Python prints this thread's name and the traceback
                Thread(target=self._generate, args=(error,), name="Thread-1 (_generate)").start()
            else:
                LOG.exception("mlx_lm.server generation thread died: %s", error)  # noqa: TRY401
            self.broken.set()

    def _load_and_serve(self) -> None:
        time.sleep(self.plan.load_time)
        self.wait_for(self.plan.load_until)
        if self.plan.load.startswith("fail"):
            self.silent = self.plan.load == "fail-0.31"
            raise RuntimeError("Missing 1 parameters: \nmodel.norm.weight.")
        self.loaded.set()
        raise RuntimeError(self.orders.get())

    @staticmethod
    def _generate(error: RuntimeError) -> None:
        raise error
