"""The run record: a gateway's children, on disk and in the reaper's hands.

    <state dir>/run/<run id>.json    one per run of a gateway; deleted at a clean end

A child is recorded before it is spawned (``intend``), with the mark that its environment will have, and then with its
pid (``add``). It is kept on record as long as its process, or another of its session, may be running: also after a
clean end of the gateway, if SIGKILL did not end the child.

Each change goes to the reaper through its pipe, and then to the file, which is for the next start if the reaper was
killed too: a disk that is full or slow does not keep the reaper from knowing all children.
"""

import itertools
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from backends.process import groups, marks, state_folder

logger = logging.getLogger(__name__)

_NAME = re.compile(r"([1-9]\d{0,9})-\d+-[0-9a-f]{8}")
MAX_GRACE = 86400.0  # seconds; what a record may ask for


@dataclass(frozen=True, slots=True)
class Child:
    """One child: the leader of its own session. ``grace``: seconds between SIGTERM and SIGKILL. ``pid`` and
    ``create_time`` (as in ``groups``): None while it is only intended."""

    mark: str
    backend: str
    grace: float
    pid: int | None = None
    create_time: float | None = None


@dataclass(frozen=True, slots=True)
class RunData:
    """The content of one run record."""

    run: str
    pid: int  # the gateway
    create_time: float
    boot: str
    children: tuple[Child, ...]


def state_dir(environ: Mapping[str, str]) -> Path:
    chosen = environ.get("MLX_GATEWAY_STATE_DIR")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_state_path("mlx-gateway")


class RunRecord:
    """The run record of this process. Raises OSError if the file cannot be created.

    Each call writes a file: call in a thread; thread-safe. ``tell`` gets the whole record, as one line, at each change.

    A later disk error is logged, and the next change writes everything again: models are still served, and the reaper
    knows their processes.
    """

    def __init__(self, folder: Path) -> None:
        pid = os.getpid()
        run = f"{pid}-{int(time.time())}-{secrets.token_hex(4)}"
        self._record = RunData(run, pid, groups.create_time(pid) or 0.0, groups.boot(), ())
        self._numbers = itertools.count(1)
        self._closed = False
        self._lock = threading.Lock()  # of the record; never held while the disk is written
        self._disk = threading.Lock()  # of the file, which gets the record as it is then
        self.tell: Callable[[bytes], None] = lambda _: None
        self.path = folder.absolute() / "run" / f"{run}.json"
        state_folder.make_private(self.path.parent)
        state_folder.write(self.path, self.line)

    @property
    def line(self) -> bytes:
        """The record as JSON, without a newline in it."""
        return json.dumps(asdict(self._record)).encode()

    @property
    def longest_grace(self) -> float:
        """Seconds, of the children on record."""
        return max((child.grace for child in self._record.children), default=0.0)

    def publish(self) -> None:
        """Tell the record as it is, to a reaper that was just started. Does not wait for the disk."""
        with self._lock:
            self.tell(self.line)

    def intend(self, *, backend: str, grace: float) -> str:
        """To be called before the spawn; returns the mark for the child's environment."""
        mark = marks.of(self._record.run, next(self._numbers))
        child = Child(mark, backend, min(float(grace), MAX_GRACE))
        self._change(lambda children: (*children, child))
        return mark

    def add(self, mark: str, *, pid: int, create_time: float) -> None:
        """The child was spawned."""
        self._change(
            lambda children: (
                replace(child, pid=pid, create_time=create_time) if child.mark == mark else child for child in children
            )
        )

    def remove(self, mark: str) -> None:
        """To be called when the whole session has ended, not only its leader; or when the spawn has failed."""
        self._change(lambda children: (child for child in children if child.mark != mark))

    def close(self) -> tuple[Child, ...]:
        """Delete the record, unless children are still running: those are left on record, for the reaper and for the
        next start, and returned. They had their grace. Later changes are not written."""
        self._change(lambda children: (replace(child, grace=0.0) for child in children if _is_running(child)))
        left = self._record.children
        with self._lock, self._disk:
            self._closed = True
            if not left:
                self.path.unlink(missing_ok=True)
        for child in left:
            logger.warning("process not ended, left on record", extra={"backend": child.backend, "pid": child.pid})
        return left

    def _change(self, change: Callable[[tuple[Child, ...]], Iterable[Child]]) -> None:
        with self._lock:
            if self._closed:
                return
            self._record = replace(self._record, children=tuple(change(self._record.children)))
            self.tell(self.line)
        with self._disk:
            if not self._closed:
                self._write()

    def _write(self) -> None:
        try:
            state_folder.write(self.path, self.line)
        except OSError as error:
            remedy = "free disk space or repair the disk"
            fields = {"path": self.path, "reason": error.strerror or error, "remedy": remedy}
            logger.warning("children not recorded on disk, only the reaper knows them", extra=fields)


def _is_running(child: Child) -> bool:
    return child.pid is not None and bool(groups.members(child.pid, child.create_time or 0.0))


# -- reading -----------------------------------------------------------------------------------------------------------


def of_dead_gateways(folder: Path) -> dict[Path, RunData]:
    """The records whose gateways have ended. A record that is not valid is set aside."""
    found = sorted((folder / "run").glob("*.json"))
    records = {path: record for path in found if (record := read(path) or _of_name(path))}
    return {path: record for path, record in records.items() if not _gateway_runs(record)}


def read(path: Path) -> RunData | None:
    """None if there is no such file, or if it is not valid: then it is set aside."""
    try:
        return parse(state_folder.read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        aside = state_folder.set_aside(path)
        logger.warning("run record is not valid, file set aside", extra={"path": path, "to": aside, "reason": error})
        return None


def _of_name(path: Path) -> RunData | None:
    """For a record that is not valid: its name is enough to find the children by their marks, once no process has the
    pid of the gateway."""
    name = _NAME.fullmatch(path.stem)
    if name is None or groups.create_time(int(name[1])) is not None:
        return None
    return RunData(path.stem, int(name[1]), 0.0, groups.boot(), ())


def parse(line: bytes) -> RunData:
    """Raises ValueError, TypeError, KeyError, RecursionError."""
    data: Any = json.loads(line)
    children = tuple(map(_child, data["children"]))
    run = _typed(str, data["run"])
    return RunData(run, _pid(data["pid"]), _typed(float, data["create_time"]), _typed(str, data["boot"]), children)


def _gateway_runs(record: RunData) -> bool:
    return record.boot == groups.boot() and groups.is_running(record.pid, record.create_time)


def _child(data: Any) -> Child:
    grace = _typed(float, data["grace"])
    if not 0.0 <= grace <= MAX_GRACE:
        raise ValueError(f"expected a grace of 0 to {MAX_GRACE:g} seconds, got {grace!r}")
    child = Child(_typed(str, data["mark"]), _typed(str, data["backend"]), grace)
    if data["pid"] is None:
        return child
    return replace(child, pid=_pid(data["pid"]), create_time=_typed(float, data["create_time"]))


T = TypeVar("T", int, float, str)


def _typed(kind: type[T], value: object) -> T:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r:.100}")
    return value


def _pid(value: object) -> int:
    """0, 1 and negative numbers would signal our own group, init, or all processes."""
    pid = _typed(int, value)
    if not 1 < pid < 2**31:
        raise ValueError(f"expected a pid, got {value!r:.100}")
    return pid
