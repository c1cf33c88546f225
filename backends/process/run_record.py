"""The record on disk of a gateway's children, and the reaping of those that outlived it.

    <state dir>/run/<gateway pid>-<time>.json    one per run of a gateway; gone after a clean end

macOS has no PDEATHSIG: the system does not end the children of a gateway that was SIGKILLed. Two things here do: the
reaper process (``backends.process.reaper``) at once, and, should it have been killed too, the next gateway at its
start. Both read these files and both call ``_reap``; doing it twice at the same time is harmless.

A child stays on record as long as it, or a member of its process group, may live: also after a clean end of the
gateway, where SIGKILL did not end it.

Caveat: a child is recorded after it exists, so a SIGKILL of the gateway between the fork and ``RunRecord.add`` leaves
it unknown. That is some milliseconds per spawn. A marker in the children's environment could close the gap, but to look
for it means reading the environments of all processes, which on macOS can block; a shell that waits for a go-ahead
before exec would too, but macOS strips DYLD_* variables when /bin/sh starts.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar

import platformdirs

from backends.process import groups

logger = logging.getLogger(__name__)

POLL = 0.05  # seconds
KILL_WAIT = 2.0  # seconds


@dataclass(frozen=True, slots=True)
class Child:
    """One child: the leader of a session of its own. ``create_time`` is the one of ``groups``."""

    backend: str
    pid: int
    create_time: float


@dataclass(frozen=True, slots=True)
class RunData:
    """What one run file says."""

    pid: int  # the gateway
    create_time: float
    boot: str
    children: tuple[Child, ...]


@dataclass(frozen=True, slots=True)
class Reaped:
    """An orphan that was found alive. ``gone`` is False where even SIGKILL did not end it in time."""

    backend: str
    pid: int
    killed: bool
    gone: bool


def state_dir(environ: Mapping[str, str]) -> Path:
    chosen = environ.get("MLX_GATEWAY_STATE_DIR")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_state_path("mlx-gateway")


class RunRecord:
    """The record of this process's children. Raises OSError when it cannot be made.

    Each call writes a file: to be made in threads, in any number of them.

    Later trouble with the disk is logged and the next change writes everything again: models are served on, only less
    well guarded.
    """

    def __init__(self, folder: Path) -> None:
        self._record = RunData(os.getpid(), groups.create_time(os.getpid()) or 0.0, groups.boot(), ())
        self.path = folder.absolute() / "run" / f"{self._record.pid}-{int(time.time())}.json"
        self._closed = False
        self._lock = threading.Lock()
        self._write()

    def add(self, *, backend: str, pid: int, create_time: float) -> None:
        with self._lock:
            self._change((*self._record.children, Child(backend, pid, create_time)))

    def remove(self, pid: int) -> None:
        """To be called when the whole group is gone, not merely its leader."""
        with self._lock:
            self._change(child for child in self._record.children if child.pid != pid)

    def close(self) -> tuple[Child, ...]:
        """Forget the run, but for the children that still live: those are left on record, for the reaper and for the
        next start, and returned. Later changes are not written."""
        with self._lock:
            left = tuple(child for child in self._record.children if groups.members(child.pid, child.create_time))
            if left:
                self._change(left)
            else:
                self.path.unlink(missing_ok=True)
            self._closed = True
        for child in left:
            logger.warning("process not ended, left on record", extra={"backend": child.backend, "pid": child.pid})
        return left

    def _change(self, children: Iterable[Child]) -> None:
        self._record = replace(self._record, children=tuple(children))
        if self._closed:
            return
        try:
            self._write()
        except OSError as error:
            logger.warning("children not recorded, they may outlive a killed gateway: %s; free or mend the disk", error)

    def _write(self) -> None:
        """Whole or not at all. Not synced: a record is of no use after the power went."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(self._record), file)
        fresh.replace(self.path)


def reap_orphans(folder: Path, *, grace: float) -> list[Reaped]:
    """End what earlier gateways that are no longer alive have left behind. Blocks for up to ``grace`` and a little."""
    records = {path: record for path in sorted((folder / "run").glob("*.json")) if (record := _read(path))}
    dead = {path: record for path, record in records.items() if not _lives(record)}
    return _reap(dead, grace)


def reap_run(path: Path, *, grace: float) -> list[Reaped]:
    """The same for one run whose gateway is known to be gone, or to have let go of its children."""
    record = _read(path)
    return _reap({path: record}, grace) if record else []


def _lives(record: RunData) -> bool:
    return record.boot == groups.boot() and groups.lives(record.pid, record.create_time)


def _reap(records: Mapping[Path, RunData], grace: float) -> list[Reaped]:
    """All of them at once, so that one grace is enough."""
    now = groups.boot()  # nothing survives a reboot
    children = [child for record in records.values() if record.boot == now for child in record.children]
    orphans = [child for child in children if groups.terminate_group(child.pid, child.create_time)]
    stubborn = _await_end(orphans, time.monotonic() + grace)
    give_up = time.monotonic() + KILL_WAIT
    left = stubborn
    while left and time.monotonic() < give_up:  # again and again: a member may fork while the signals go out
        for child in left:
            groups.signal_group(child.pid, child.create_time, Signals.SIGKILL)
        left = _await_end(left, time.monotonic() + POLL)
    for path, record in records.items():
        if not any(child in left for child in record.children):  # else the next start tries again
            path.with_suffix(".tmp").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    return [Reaped(child.backend, child.pid, killed=child in stubborn, gone=child not in left) for child in orphans]


def _await_end(children: Iterable[Child], deadline: float) -> list[Child]:
    """Those whose groups still have live members at the deadline. They are not our children: we must look."""
    while True:
        left = [child for child in children if groups.members(child.pid, child.create_time)]
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(POLL)


def _read(path: Path) -> RunData | None:
    """None if it is gone or makes no sense; then it is moved aside."""
    try:
        return _parse(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("run file not read, orphans of that run are left alone: %s", error)
        return None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        aside = path.with_suffix(".corrupt")
        logger.warning("run file %s makes no sense (%r), moved to %s; orphans of that run are left", path, error, aside)
        path.replace(aside)
        return None


def _parse(data: Any) -> RunData:
    children = tuple(
        Child(_typed(str, one["backend"]), _child_pid(one["pid"]), _typed(float, one["create_time"]))
        for one in data["children"]
    )
    return RunData(_typed(int, data["pid"]), _typed(float, data["create_time"]), _typed(str, data["boot"]), children)


T = TypeVar("T", int, float, str)


def _typed(kind: type[T], value: object) -> T:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


def _child_pid(value: object) -> int:
    """0, 1 and negative numbers would address our own group, init, or everybody."""
    pid = _typed(int, value)
    if not 1 < pid < 2**31:
        raise ValueError(f"expected a pid, got {value!r}")
    return pid
