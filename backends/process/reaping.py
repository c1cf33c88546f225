"""The end of children that outlived their gateway: found by their sessions and by their marks, ended with their grace.

``reap_run`` is for the reaper, at the moment when the gateway has ended: what the record names is certain, and a child
may be between its fork and its exec, so marks are looked for until each intended child was found. ``reap_orphans`` is
for the next start, perhaps days later: a session that has lost its leader may be somebody else's by then, so of such a
session only processes with a mark of the run are ended.

Two concurrent calls are harmless. Both block for the longest grace and some seconds.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

from backends.process import groups, marks
from backends.process.run_record import Child, RunData, of_dead_gateways, read

logger = logging.getLogger(__name__)

POLL = 0.05  # seconds between two checks of processes: they are not children of this process
SEARCH_PAUSE = 0.05  # seconds between two searches for marks
SEARCHING = 5.0  # seconds of all searches together; and of looking for a child that may have been spawned
DEFAULT_GRACE = 20.0  # seconds, of a process whose child is not on record


@dataclass(frozen=True, slots=True)
class Reaped:
    """An orphan that was found running. ``gone`` is False if even SIGKILL did not end it."""

    backend: str
    pid: int
    killed: bool
    gone: bool


def reap_orphans(folder: Path) -> list[Reaped]:
    """End the children that dead gateways have left."""
    return _Reaping(of_dead_gateways(folder), watched=False).run()


def reap_run(path: Path, told: RunData | None = None) -> list[Reaped]:
    """The same for one run, whose gateway has just ended or released its children. ``told``: the record as the gateway
    sent it last; else the file is read."""
    record = told or read(path)
    return _Reaping({path: record} if record else {}, watched=True).run()


@dataclass(slots=True)
class _Target:
    """A session, or one process that has left its session."""

    path: Path
    backend: str
    pid: int
    create_time: float
    grace: float
    session: bool
    kill_at: float = 0.0  # monotonic seconds
    killed: bool = False

    @property
    def running(self) -> bool:
        if self.session:
            return bool(groups.members(self.pid, self.create_time))
        return groups.is_running(self.pid, self.create_time)

    def terminate(self) -> None:
        self.kill_at = time.monotonic() + self.grace
        if self.session:
            groups.terminate_session(self.pid, self.create_time)
        elif groups.signal_process(self.pid, self.create_time, Signals.SIGTERM):
            groups.signal_process(self.pid, self.create_time, Signals.SIGCONT)

    def kill(self) -> None:
        self.killed = True
        end = groups.signal_session if self.session else groups.signal_process
        end(self.pid, self.create_time, Signals.SIGKILL)


@dataclass(slots=True)
class _Reaping:
    """``watched``: the gateway ended just now, and has watched its children until then."""

    records: Mapping[Path, RunData]
    watched: bool
    _targets: list[_Target] = field(default_factory=list)
    _budget: float = SEARCHING
    _missing: set[str] = field(default_factory=set)  # marks of children that may be between fork and exec

    def run(self) -> list[Reaped]:
        boot = groups.boot()  # no process survives a reboot
        current = {path: record for path, record in self.records.items() if record.boot == boot}
        children = [(path, child) for path, record in current.items() for child in record.children]
        self._missing = {child.mark for _, child in children if child.pid is None and self.watched}
        self._add(target for path, child in children if (target := self._session(path, child)) is not None)
        if current and (children or not self.watched):
            self._end_all(current)
        left = {target.path for target in self._targets if target.running}
        for path in self.records:
            if path not in left:  # else the next start tries again
                with suppress(OSError):
                    path.with_suffix(".tmp").unlink(missing_ok=True)
                    path.unlink(missing_ok=True)
        return [Reaped(one.backend, one.pid, one.killed, gone=not one.running) for one in self._targets]

    def _session(self, path: Path, child: Child) -> _Target | None:
        if child.pid is None or child.create_time is None:
            return None
        if not self.watched and not groups.leads(child.pid, child.create_time):
            return None
        return _Target(path, child.backend, child.pid, child.create_time, child.grace, session=True)

    def _add(self, targets: Iterable[_Target]) -> None:
        for target in targets:
            if target.running:
                logger.info(
                    "ending process of an earlier gateway", extra={"backend": target.backend, "pid": target.pid}
                )
                target.terminate()
                self._targets.append(target)

    def _end_all(self, records: Mapping[Path, RunData]) -> None:
        """Until all have ended and a last search finds no more."""
        began, searched_at = time.monotonic(), float("-inf")
        while True:
            left = self._enforce()
            now = time.monotonic()
            if now - began > SEARCHING:
                self._missing.clear()
            wanted = self._missing or not left or searched_at < began
            if wanted and self._budget > 0 and now - searched_at >= SEARCH_PAUSE:
                found = self._search(records)
                self._add(found)
                searched_at = time.monotonic()
                self._budget -= searched_at - now
                if not found and not left and not self._missing:
                    return
            elif not left and self._budget <= 0:
                return
            time.sleep(POLL)

    def _enforce(self) -> list[_Target]:
        """SIGKILL to those whose grace is over, repeated because a member may fork meanwhile. The targets that may
        still end."""
        now = time.monotonic()
        running = [target for target in self._targets if now < target.kill_at + groups.KILL_WAIT and target.running]
        for target in running:
            if now >= target.kill_at:
                target.kill()
        return running

    def _search(self, records: Mapping[Path, RunData]) -> list[_Target]:
        """Processes with a mark that are in no session that is being ended."""
        runs = {record.run: (path, record) for path, record in records.items()}
        since = min(record.create_time for record in records.values())
        marked = marks.find(lambda mark: marks.run_of(mark) in runs, since=since, within=self._budget)
        self._missing -= {one.mark for one in marked}
        known = {(target.pid, target.create_time) for target in self._targets}
        sessions = {target.pid for target in self._targets if target.session}
        return [
            self._stray(one, *runs[marks.run_of(one.mark)])
            for one in marked
            if (one.pid, one.create_time) not in known and groups.session(one.pid) not in sessions
        ]

    def _stray(self, one: marks.Marked, path: Path, record: RunData) -> _Target:
        """The process, or its session if it is the child itself that was not recorded any more."""
        child = _by_mark(record.children, one.mark)
        backend, grace = (child.backend, child.grace) if child is not None else ("unknown", DEFAULT_GRACE)
        leads = groups.session(one.pid) == one.pid
        return _Target(path, backend, one.pid, one.create_time, grace, session=leads)


def _by_mark(children: Sequence[Child], mark: str) -> Child | None:
    return next((child for child in children if child.mark == mark), None)
