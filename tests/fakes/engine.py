"""The generation thread of a fake, and the ways it and its process go down."""

import logging
import os
import sys
import time
from queue import Queue
from threading import Event, Thread

from tests.fakes.plan import ABORT, SAYINGS, Plan

LOG = logging.getLogger("fake_mlx")  # its name is not printed: the lines look like the real ones


def say(plan: Plan) -> None:
    if plan.say:
        sys.stderr.write((ABORT if plan.abort else "") + SAYINGS[plan.say] + ("" if plan.say == "bars" else "\n"))
        sys.stderr.flush()


def die(plan: Plan) -> None:
    """For good, without clean-up."""
    say(plan)
    if plan.exit < 0:
        os.kill(os.getpid(), -plan.exit)
        Event().wait()
    os._exit(plan.exit)


class Engine:
    """Starts loading at once. The thread is no daemon: it keeps the process alive when the port cannot be bound, as in
    mlx-lm since 0.28.4."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.loaded, self.broken = Event(), Event()
        self.answering: set[object] = set()  # the answers of which tokens are being made
        self.silent = False  # if broken, nobody is told: /health stays 200, requests wait for ever
        self.orders: Queue[str] = Queue()  # to break down, with these words
        Thread(target=self._run_generate).start()

    @property
    def healthy(self) -> bool:
        return self.silent or not self.broken.is_set()

    def check(self, seconds: float = 0.0) -> None:
        """Wait so long; RuntimeError, or no return at all, if generation has broken down meanwhile."""
        if self.broken.wait(seconds):
            if self.silent:
                Event().wait()
            raise RuntimeError("generation thread died")

    def break_down(self, words: str, *, silent: bool = False) -> None:
        """Does not return to whoever was generating."""
        self.silent = silent
        self.orders.put(words)
        self.check(60)

    def hang(self) -> None:
        """All requests, now and later, with nothing in the log."""
        self.silent = True
        self.broken.set()
        self.check()

    def _run_generate(self) -> None:
        try:
            self._live()
        except RuntimeError as error:
            if self.silent:  # up to 0.31.3 nothing caught it: Python prints this thread's name and the traceback
                Thread(target=self._generate, args=(error,), name="Thread-1 (_generate)").start()
            else:
                LOG.exception("mlx_lm.server generation thread died: %s", error)  # noqa: TRY401
            self.broken.set()

    def _live(self) -> None:
        time.sleep(self.plan.load_time)
        if self.plan.load.startswith("fail"):
            self.silent = self.plan.load == "fail-0.31"
            raise RuntimeError("Missing 1 parameters: \nmodel.norm.weight.")
        self.loaded.set()
        raise RuntimeError(self.orders.get())

    @staticmethod
    def _generate(error: RuntimeError) -> None:
        raise error
