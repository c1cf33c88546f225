"""The run record: a gateway's children on disk, and the reaping of children that outlived their gateway.

    <state dir>/run/<gateway pid>-<time>.json    one per run of a gateway; deleted at a clean end

macOS has no PDEATHSIG: the system does not end the children of a gateway that was SIGKILLed. The reaper process
(``backends.process.reaper``) does so at once, and, if it was killed too, the next gateway at its start. Both read these
files and call ``_reap``; two concurrent calls are harmless.

A child is kept on record as long as its process, or a member of its process group, may be running: also after a clean
end of the gateway, if SIGKILL did not end the child.

Caveat: a child is recorded after the fork, so a SIGKILL of the gateway between the fork and ``RunRecord.add`` leaves it
unrecorded. That is some milliseconds per spawn. Two alternatives were rejected: a marker in the children's environment
(finding it means reading the environments of all processes, which on macOS can block), and a shell that waits for a
go-ahead before exec (macOS strips DYLD_* variables when /bin/sh starts).
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

POLL = 0.05  # seconds between two checks of process groups
KILL_WAIT = 2.0  # seconds of repeated SIGKILL


@dataclass(frozen=True, slots=True)
class Child:
    """One child: the leader of its own session. ``create_time``: as in ``groups``."""

    backend: str
    pid: int
    create_time: float


@dataclass(frozen=True, slots=True)
class RunData:
    """The content of one run file."""

    pid: int  # the gateway
    create_time: float
    boot: str
    children: tuple[Child, ...]


@dataclass(frozen=True, slots=True)
class Reaped:
    """An orphan that was found running. ``gone`` is False if even SIGKILL did not end it within ``KILL_WAIT``."""

    backend: str
    pid: int
    killed: bool
    gone: bool


def state_dir(environ: Mapping[str, str]) -> Path:
    chosen = environ.get("MLX_GATEWAY_STATE_DIR")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_state_path("mlx-gateway")


class RunRecord:
    """The run record of this process. Raises OSError if the file cannot be created.

    Each call writes a file: call in a thread; thread-safe.

    A later disk error is logged, and the next change writes everything again: models are still served, but their
    processes may outlive a killed gateway.
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
        """To be called when the whole group has ended, not only its leader."""
        with self._lock:
            self._change(child for child in self._record.children if child.pid != pid)

    def close(self) -> tuple[Child, ...]:
        """Delete the record, unless children are still running: those are left on record, for the reaper and for the
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
            message = "children not recorded, they may outlive a killed gateway: %s; free disk space or repair the disk"
            logger.warning(message, error)

    def _write(self) -> None:
        """Atomic. No fsync: a record is of no use after a power failure."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(self._record), file)
        fresh.replace(self.path)


def reap_orphans(folder: Path, *, grace: float) -> list[Reaped]:
    """End the children that dead gateways have left. Blocks for up to ``grace`` + ``KILL_WAIT`` seconds."""
    records = {path: record for path in sorted((folder / "run").glob("*.json")) if (record := _read(path))}
    dead = {path: record for path, record in records.items() if not _is_running(record)}
    return _reap(dead, grace)


def reap_run(path: Path, *, grace: float) -> list[Reaped]:
    """The same for one run, whose gateway is known to have ended or to have released its children."""
    record = _read(path)
    return _reap({path: record}, grace) if record else []


def _is_running(record: RunData) -> bool:
    return record.boot == groups.boot() and groups.is_running(record.pid, record.create_time)


def _reap(records: Mapping[Path, RunData], grace: float) -> list[Reaped]:
    """All children at once, so that the grace counts once."""
    boot = groups.boot()  # no process survives a reboot
    children = [child for record in records.values() if record.boot == boot for child in record.children]
    orphans = [child for child in children if groups.terminate_group(child.pid, child.create_time)]
    stubborn = _await_end(orphans, time.monotonic() + grace)
    give_up = time.monotonic() + KILL_WAIT
    left = stubborn
    while left and time.monotonic() < give_up:  # repeated: a member may fork while the signals go out
        for child in left:
            groups.signal_group(child.pid, child.create_time, Signals.SIGKILL)
        left = _await_end(left, time.monotonic() + POLL)
    for path, record in records.items():
        if not any(child in left for child in record.children):  # else the next start tries again
            path.with_suffix(".tmp").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    return [Reaped(child.backend, child.pid, killed=child in stubborn, gone=child not in left) for child in orphans]


def _await_end(children: Iterable[Child], deadline: float) -> list[Child]:
    """The children whose groups still have running members at the deadline. By polling: they are not children of this
    process."""
    while True:
        left = [child for child in children if groups.members(child.pid, child.create_time)]
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(POLL)


def _read(path: Path) -> RunData | None:
    """None if the file does not exist, cannot be read, or is not valid; the last is moved aside."""
    try:
        return _parse(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("run file not read, orphans of that run are not ended: %s", error)
        return None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        aside = path.with_suffix(".corrupt")
        logger.warning("run file %s is not valid (%r), moved to %s; its orphans are not ended", path, error, aside)
        path.replace(aside)
        return None


def _parse(data: Any) -> RunData:
    children = tuple(
        Child(_typed(str, child["backend"]), _child_pid(child["pid"]), _typed(float, child["create_time"]))
        for child in data["children"]
    )
    return RunData(_typed(int, data["pid"]), _typed(float, data["create_time"]), _typed(str, data["boot"]), children)


T = TypeVar("T", int, float, str)


def _typed(kind: type[T], value: object) -> T:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


def _child_pid(value: object) -> int:
    """0, 1 and negative numbers would signal our own group, init, or all processes."""
    pid = _typed(int, value)
    if not 1 < pid < 2**31:
        raise ValueError(f"expected a pid, got {value!r}")
    return pid
